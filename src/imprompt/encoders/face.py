"""Who is in a picture, and where the face is: one interface for every face encoder.

"diorama"                the small network that comes with the package, for the embedded world
FILE.safetensors         another one, of `imprompt train face-encoder`
"insightface"            the recogniser that the published face adapters read, for photos
"insightface:buffalo_l"  another model of that library
"""

from __future__ import annotations

import hashlib
from functools import cache
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor

from imprompt.bases.clip_vision import fingerprint_of
from imprompt.core.errors import ImpromptError
from imprompt.core.images import bytes_of_pixels
from imprompt.core.shipped import shipped
from imprompt.encoders.face_network import (
    FaceNetwork,
    as_the_network_reads,
    load_face_network,
)

INSIGHTFACE = "insightface"
DEFAULT_PACK = "antelopev2"  # InstantID's
# What the published adapters of these variants, and one file of the variant of InstantID's, were
# trained with; all others with the default.
PACKS = {
    "faceid": "insightface:buffalo_l",
    "faceid-plus": "insightface:buffalo_l",
    "ip-adapter-faceid-portrait_sdxl_unnorm": "insightface:buffalo_l",
}
ALL_PACKS = (DEFAULT_PACK, "buffalo_l", "buffalo_m", "buffalo_s", "buffalo_sc")
MAX_PICTURES_KNOWN = 1024
CROP_SIZE_PX = 224
CROP_PLACES_SIZE_PX = 112
CROP_PLACES = ((38.29, 51.70), (73.53, 51.50), (56.03, 71.74), (41.55, 92.37), (70.73, 92.20))
_loading = Lock()


@runtime_checkable
class FaceEncoder(Protocol):
    """Pictures (batch, 3, height, width) in [-1, 1] to persons.

    Attributes:
        name: as given to `load_face_encoder`.
        embed_dim: width of the identity vector.
    """

    name: str

    @property
    def embed_dim(self) -> int: ...

    def embeds(
        self, pixels: Float[Tensor, "batch 3 height width"], *, normalized: bool = True
    ) -> Float[Tensor, "batch dim"]:
        """Identity vectors of the largest face in each picture, of length 1 or as they come.

        Raises:
            ImpromptError: a picture shows no face.
        """
        ...

    def landmarks(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 5 2"]:
        """The five landmarks of the same face, fractions of width and height."""
        ...

    def crops(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 size size"]:
        """The same face, upright and filling the picture, as face-id-plus shows it to an image encoder."""
        ...

    def finds_face(self, pixels: Float[Tensor, "3 height width"]) -> bool:
        """Whether the others can be asked of this picture."""
        ...

    def fingerprint(self) -> str:
        """Tells this encoder from every other."""
        ...


def load_face_encoder(name_or_path: str | PathLike[str] = "diorama") -> FaceEncoder:
    """See the module's list of what may be given.

    Raises:
        ImpromptError: there is no such encoder, or insightface is not installed.
    """
    text = str(name_or_path)
    if text == "diorama":
        return DioramaFaceEncoder(
            load_face_network(shipped("diorama-face-encoder.safetensors")), text
        )
    if text.partition(":")[0] == INSIGHTFACE:
        return InsightFaceEncoder(text.partition(":")[2] or DEFAULT_PACK)
    if text.endswith(".safetensors"):
        return DioramaFaceEncoder(load_face_network(Path(name_or_path)), text)
    raise ImpromptError(
        f"There is no face encoder {text!r}: give diorama, a .safetensors file that "
        "`imprompt train face-encoder` wrote, or insightface."
    )


def loaded_face_encoder(name: str) -> FaceEncoder:
    """The face encoder of this name, read once in a process, whichever thread asks first.

    A file that was written anew is read anew.

    Raises:
        ImpromptError: as `load_face_encoder`.
    """
    if name == INSIGHTFACE:
        name = f"{INSIGHTFACE}:{DEFAULT_PACK}"
    path = Path(name)
    written = path.stat().st_mtime_ns if path.suffix == ".safetensors" and path.is_file() else 0
    with _loading:
        return _loaded(name, written)


@cache
def _loaded(name: str, written: int) -> FaceEncoder:
    # What is kept shall also serve where gradients are taken, though generation asks first.
    with torch.inference_mode(False):
        return load_face_encoder(name)


def face_encoder_with(fingerprint: str) -> FaceEncoder | None:
    """Of the package's own face encoder and insightface's the one with this fingerprint, if any has it.

    Raises:
        ImpromptError: it is one of insightface's and cannot be loaded.
    """
    if loaded_face_encoder("diorama").fingerprint() == fingerprint:
        return loaded_face_encoder("diorama")
    pack = pack_with(fingerprint)
    return None if pack is None else loaded_face_encoder(pack)


def pack_with(fingerprint: str) -> str | None:
    """The name of insightface's model with this fingerprint ("insightface:buffalo_l"), if any has it."""
    names = (f"{INSIGHTFACE}:{pack}" for pack in ALL_PACKS)
    return next((name for name in names if _fingerprint_of_name(name) == fingerprint), None)


def published_encoder_of(variant: str, published: str = "") -> str:
    """The name of the face encoder that a published adapter was trained with, told by its variant and name."""
    return PACKS.get(published) or PACKS.get(variant, f"{INSIGHTFACE}:{DEFAULT_PACK}")


class DioramaFaceEncoder:
    """The embedded world's encoder. It takes the whole picture for a portrait."""

    def __init__(self, network: FaceNetwork, name: str = "diorama") -> None:
        self.network = network.eval().requires_grad_(False)
        self.name = name

    @property
    def embed_dim(self) -> int:
        return self.network.embed_dim

    @torch.no_grad()
    def embeds(
        self, pixels: Float[Tensor, "batch 3 height width"], *, normalized: bool = True
    ) -> Float[Tensor, "batch dim"]:
        embeds, _ = self.read(pixels)
        return functional.normalize(embeds, dim=1) if normalized else embeds

    @torch.no_grad()
    def landmarks(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 5 2"]:
        return self.read(pixels)[1]

    def crops(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        return pixels

    def finds_face(self, pixels: Float[Tensor, "3 height width"]) -> bool:
        return True

    def fingerprint(self) -> str:
        return fingerprint_of({"face_encoder": self.network})

    def read(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch 5 2"]]:
        """Identity vectors as they come, and landmarks; gradients pass through."""
        pixels = as_the_network_reads(pixels.to(next(self.network.parameters())))
        parts = [self.network(part) for part in pixels.split(128)]
        return torch.cat([embeds for embeds, _ in parts]), torch.cat([found for _, found in parts])


class InsightFaceEncoder:
    """A recogniser of the `insightface` library, which the user installs; its models are its own.

    (They are free for research that is not commercial; read their licence.)
    """

    def __init__(self, pack: str = DEFAULT_PACK, analysis: Any = None) -> None:
        """`analysis` is the library's `FaceAnalysis`, ready to use; by default made for the pack.

        Raises:
            ImpromptError: the library or the model is missing.
        """
        self.name = f"{INSIGHTFACE}:{pack}"
        self.pack = pack
        self._analysis = _face_analysis(pack) if analysis is None else analysis
        self._known: dict[bytes, Any] = {}
        self._lock = Lock()

    @property
    def embed_dim(self) -> int:
        return 512

    def embeds(
        self, pixels: Float[Tensor, "batch 3 height width"], *, normalized: bool = True
    ) -> Float[Tensor, "batch dim"]:
        rows = [torch.from_numpy(np.asarray(face.embedding)) for face in self._faces(pixels)]
        embeds = torch.stack(rows).float()
        return functional.normalize(embeds, dim=1) if normalized else embeds

    def landmarks(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 5 2"]:
        height, width = pixels.shape[-2:]
        rows = [torch.from_numpy(np.asarray(face.kps)) for face in self._faces(pixels)]
        return torch.stack(rows).float() / torch.tensor([width, height])

    def crops(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 size size"]:
        places = self.landmarks(pixels) * torch.tensor(pixels.shape[:1:-1])
        return torch.cat(
            [aligned(one[None], where) for one, where in zip(pixels, places, strict=True)]
        )

    def finds_face(self, pixels: Float[Tensor, "3 height width"]) -> bool:
        return self._largest(_picture_bytes(pixels[None])[0]) is not None

    def fingerprint(self) -> str:
        return _fingerprint_of_name(self.name)

    def _faces(self, pixels: Tensor) -> list[Any]:
        """The largest face of each picture."""
        chosen = [self._largest(picture) for picture in _picture_bytes(pixels)]
        if None in chosen:
            raise ImpromptError(
                f"{self.name} finds no face in picture {chosen.index(None) + 1} of {len(chosen)}: give "
                "one that shows a face, neither very small nor from behind."
            )
        return chosen

    def _largest(self, picture: np.ndarray) -> Any | None:
        """Found once for all that is asked of a picture, since to look for faces is most of the work."""
        key = hashlib.blake2b(picture.tobytes(), person=str(picture.shape).encode()[:16]).digest()
        with self._lock:
            if key in self._known:
                return self._known[key]
        # Outside the lock, so that threads look at the same time. The library allows it: `get` writes
        # only to the faces it makes, sessions of onnxruntime may run in many threads, and what the
        # detector keeps for itself (`center_cache`) is the same whichever thread computed it.
        found = self._looked_for(picture)
        with self._lock:
            if len(self._known) >= MAX_PICTURES_KNOWN:
                del self._known[next(iter(self._known))]
            self._known[key] = found
        return found

    def _looked_for(self, picture: np.ndarray) -> Any | None:
        """The largest face. The detector misses one that fills the picture: it is looked for once more in a
        picture with as much again of black around it."""
        found = max(self._analysis.get(picture), key=_area, default=None)
        if found is not None:
            return found
        top, left = (side // 2 for side in picture.shape[:2])
        wider = np.pad(picture, ((top, top), (left, left), (0, 0)))
        found = max(self._analysis.get(wider), key=_area, default=None)
        if found is not None:
            found.kps = np.asarray(found.kps) - (left, top)
            found.bbox = np.asarray(found.bbox) - (left, top, left, top)
        return found


def _fingerprint_of_name(name: str) -> str:
    """Insightface's models are told by their names, so that none is loaded to be compared."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _picture_bytes(pixels: Tensor) -> list[np.ndarray]:
    """Pictures as the library wants them: (height, width, 3), BGR."""
    values = bytes_of_pixels(pixels.detach().cpu()).permute(0, 2, 3, 1).numpy()
    return [np.ascontiguousarray(picture[:, :, ::-1]) for picture in values]


def aligned(
    pixels: Float[Tensor, "1 3 height width"], places: Float[Tensor, "5 2"]
) -> Float[Tensor, "1 3 size size"]:
    """A face brought by turning, scaling and shifting to where ArcFace's crops have their landmarks.

    `places` are pixel indices (x, y). Beyond the picture it is black, as in insightface's `norm_crop`.

    Source: the similarity that takes the face's places best to the crop's, Umeyama 1991; the crop's places
    are ArcFace's (1801.07698).
    """
    wanted = torch.tensor(CROP_PLACES) / CROP_PLACES_SIZE_PX * CROP_SIZE_PX
    # Unknowns of x' = a·x - b·y + c, y' = b·x + a·y + d. The best fit of crop to picture would be another,
    # larger one for every face that is turned away.
    x, y = places.float().cpu().T
    one, zero = torch.ones(5), torch.zeros(5)
    rows = torch.cat([torch.stack([x, -y, one, zero], 1), torch.stack([y, x, zero, one], 1)])
    a, b, c, d = torch.linalg.lstsq(rows, wanted.T.reshape(-1, 1)).solution[:, 0]
    axis = torch.arange(CROP_SIZE_PX)
    to_y, to_x = torch.meshgrid(axis - d, axis - c, indexing="ij")
    squared = a * a + b * b
    from_x, from_y = (a * to_x + b * to_y) / squared, (a * to_y - b * to_x) / squared
    height, width = pixels.shape[-2:]
    grid = torch.stack([(from_x + 0.5) / width, (from_y + 0.5) / height], 2)[None] * 2 - 1
    above_black = functional.grid_sample(
        pixels.float() + 1, grid.to(pixels.device), align_corners=False
    )
    return above_black - 1


def _area(face: Any) -> float:
    left, top, right, bottom = (float(v) for v in face.bbox[:4])
    return (right - left) * (bottom - top)


def _face_analysis(pack: str) -> Any:
    try:
        from insightface.app import FaceAnalysis  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImpromptError(
            "Faces in photos are read by insightface, which is not installed: pip install "
            '"imprompt[faces]". (For pictures of the embedded world use the face encoder diorama.)'
        ) from error
    try:
        analysis = FaceAnalysis(name=pack)
        # Of several processes each has a GPU of its own.
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else -1
        analysis.prepare(ctx_id=gpu, det_size=(640, 640))
    except Exception as error:  # the library downloads, unpacks and asserts
        reason = str(error)
        if isinstance(error, AssertionError) and not reason:
            # All that the library says when antelopev2's archive unpacks to a folder in its folder.
            reason = (
                f"no detector found in ~/.insightface/models/{pack}: move its .onnx files up out of "
                "the inner folder"
            )
        raise ImpromptError(f"insightface cannot load its model {pack!r}: {reason}") from error
    return analysis
