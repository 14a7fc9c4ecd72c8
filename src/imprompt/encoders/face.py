"""Who is in a picture, and where the face is: one interface for every face encoder.

"diorama"                the small network that comes with the package, for the embedded world
FILE.safetensors         another one, of `imprompt train face-encoder`
"insightface"            the recogniser that the published face adapters read, for photos
"insightface:buffalo_l"  another model of that library
"""

from __future__ import annotations

import hashlib
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor

from imprompt.bases.clip_vision import fingerprint_of
from imprompt.core.errors import ImpromptError
from imprompt.encoders.face_network import SIZE_PX, FaceNetwork, load_face_network

DIORAMA_FILE = Path(__file__).parent.parent / "weights" / "diorama-face-encoder.safetensors"
INSIGHTFACE = "insightface"
# InstantID reads antelopev2; the face-id adapters were trained with buffalo_l, whose vectors it can read too.
DEFAULT_PACK = "antelopev2"


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

    def embeds(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Identity vectors of length 1, of the largest face in each picture.

        Raises:
            ImpromptError: a picture shows no face.
        """
        ...

    def landmarks(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 5 2"]:
        """The five landmarks of the same face, fractions of width and height."""
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
        return DioramaFaceEncoder(load_face_network(DIORAMA_FILE), text)
    if text.partition(":")[0] == INSIGHTFACE:
        return InsightFaceEncoder(text.partition(":")[2] or DEFAULT_PACK)
    if text.endswith(".safetensors"):
        return DioramaFaceEncoder(load_face_network(Path(name_or_path)), text)
    raise ImpromptError(
        f"There is no face encoder {text!r}: give diorama, a .safetensors file that "
        "`imprompt train face-encoder` wrote, or insightface."
    )


class DioramaFaceEncoder:
    """The embedded world's encoder. It takes the whole picture for a portrait."""

    def __init__(self, network: FaceNetwork, name: str = "diorama") -> None:
        self.network = network.eval().requires_grad_(False)
        self.name = name

    @property
    def embed_dim(self) -> int:
        return self.network.embed_dim

    @torch.no_grad()
    def embeds(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return functional.normalize(self._read(pixels)[0], dim=1)

    @torch.no_grad()
    def landmarks(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 5 2"]:
        return self._read(pixels)[1]

    def fingerprint(self) -> str:
        return fingerprint_of({"face_encoder": self.network})

    def _read(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        pixels = pixels.to(next(self.network.parameters())).clamp(-1, 1)
        if pixels.shape[-2:] != (SIZE_PX, SIZE_PX):
            pixels = functional.interpolate(
                pixels, size=(SIZE_PX, SIZE_PX), mode="bicubic", antialias=True
            ).clamp(-1, 1)
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

    @property
    def embed_dim(self) -> int:
        return 512

    def embeds(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        rows = [torch.from_numpy(np.asarray(face.embedding)) for face in self._faces(pixels)]
        return functional.normalize(torch.stack(rows).float(), dim=1)

    def landmarks(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 5 2"]:
        height, width = pixels.shape[-2:]
        rows = [torch.from_numpy(np.asarray(face.kps)) for face in self._faces(pixels)]
        return torch.stack(rows).float() / torch.tensor([width, height])

    def fingerprint(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()[:16]

    def _faces(self, pixels: Tensor) -> list[Any]:
        """The largest face of each picture; the library wants BGR bytes."""
        values = ((pixels.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round()
        chosen: list[Any] = []
        for number, picture in enumerate(values.to(torch.uint8).permute(0, 2, 3, 1).numpy()):
            found = self._analysis.get(np.ascontiguousarray(picture[:, :, ::-1]))
            if not found:
                raise ImpromptError(
                    f"{self.name} finds no face in picture {number + 1} of {len(values)}: give one "
                    "that shows a face, large enough and not from behind."
                )
            chosen.append(max(found, key=_area))
        return chosen


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
        analysis.prepare(ctx_id=0 if torch.cuda.is_available() else -1, det_size=(640, 640))
    except Exception as error:  # the library downloads, unpacks and asserts
        raise ImpromptError(f"insightface cannot load its model {pack!r}: {error}") from error
    return analysis
