"""Is the person kept, and is the face where it was asked for? With every part, and without each.

Measured are identities, and face-id adapters, which have no IdentityNet and are told no place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from imprompt.adapters import ImagePromptAdapter
from imprompt.bases import Base
from imprompt.checkpoints import load_adapter
from imprompt.checkpoints.identity import Identity, load_identity, reads_faces
from imprompt.core.errors import ImpromptError
from imprompt.core.images import image_grid, pixels_to_images
from imprompt.diorama import landmarks_of
from imprompt.encoders.face import FaceEncoder
from imprompt.encoders.landmarks import landmark_images
from imprompt.evaluation.judge import read, shares, truth
from imprompt.evaluation.measure import Sampling, draw
from imprompt.evaluation.portraits import (
    IdentityResult,
    Portraits,
    drawn,
    judge_identity,
    load_face_judge,
    templates,
    unseen_portraits,
)
from imprompt.generation.conditions import TokenPrompt
from imprompt.generation.controls import MapControl, placed
from imprompt.generation.faces import (
    face_encoder_of,
    face_features,
    face_features_of_nothing,
)
from imprompt.systems.classifier import Judge


@dataclass(frozen=True, kw_only=True)
class Without:
    """Which part is left out of a measurement."""

    adapter: bool = False
    net: bool = False


ABLATIONS: dict[str, Without] = {
    "all": Without(),
    "without IdentityNet": Without(net=True),
    "without adapter": Without(adapter=True),
    "text alone": Without(adapter=True, net=True),
}
FACE_ID_ABLATIONS = ("all", "text alone")
"""Those that differ where there is no IdentityNet."""


def load_person(path: Path, device: str | torch.device = "cpu") -> Identity | ImagePromptAdapter:
    """An identity from its folder, or a face-id adapter from its file.

    Raises:
        ImpromptError: it is neither, or damaged.
    """
    if path.is_dir():
        return load_identity(path, device=device)
    adapter = load_adapter(path, device=device)
    if not reads_faces(adapter):
        raise ImpromptError(
            f"{path} is a {adapter.variant} adapter and reads no faces: give an identity's folder or "
            "a face-id adapter's file."
        )
    return adapter


def draw_identity(
    base: Base,
    identity: Identity | ImagePromptAdapter,
    faces: FaceEncoder,
    portraits: Portraits,
    sampling: Sampling,
    *,
    without: Without | None = None,
    scale: float = 1.0,
    net_weight: float = 1.0,
) -> Tensor:
    """Pixels of the portraits that are asked for, drawn from references, landmarks and captions.

    A face-id adapter is an image prompt of the references, and sees no landmarks.
    """
    without = without or Without()
    adapter = _adapter_of(identity)
    pixels = drawn(portraits.references)
    features = face_features(adapter, list(pixels), faces, base.image_encoder)
    with torch.no_grad(), adapter.install(base.unet) as handle:
        tokens = adapter.tokens(*features)
        zero = adapter.tokens(*face_features_of_nothing(adapter, base.image_encoder))
        prompts = [TokenPrompt(handle=handle, tokens=tokens, zero_tokens=zero, scale=scale)]
        controls: list[MapControl] = []
        if isinstance(identity, Identity) and not without.net:
            size_px = base.image_size_px
            control = MapControl(
                module=placed(identity.net, base),
                maps=landmark_images(landmarks_of(portraits.targets), size_px, size_px),
                weight=net_weight,
                tokens=tokens,
                zero_tokens=zero,
            )
            controls = [control]
        return draw(
            base,
            portraits.texts,
            [] if without.adapter else prompts,
            sampling,
            controls=controls,
        )


def measure_identity(
    base: Base,
    identity: Identity | ImagePromptAdapter,
    faces: FaceEncoder,
    sampling: Sampling,
    count: int = 100,
    *,
    scale: float = 1.0,
    ablations: Sequence[str] | None = None,
    face_judge: FaceEncoder | None = None,
) -> dict[str, IdentityResult]:
    """Renders of what was asked for (the best that can be reached), then what is drawn, by ablation.

    faces: the encoder that the identity was trained with. ablations: by default all that say something of
    it. face_judge: who looks at what was drawn, the one that comes with the package if None.
    """
    if ablations is None:
        ablations = tuple(ABLATIONS) if isinstance(identity, Identity) else FACE_ID_ABLATIONS
    face_judge = face_judge or load_face_judge()
    portraits = unseen_portraits(count)
    known_by = templates(face_judge, portraits.characters)
    renders = drawn(portraits.targets)
    results = {"renders": judge_identity(renders, portraits, face_judge, known_by)}
    for name in ablations:
        images = draw_identity(
            base, identity, faces, portraits, sampling, without=ABLATIONS[name], scale=scale
        )
        results[name] = judge_identity(images, portraits, face_judge, known_by)
    return results


def evaluate_identity(
    base: Base,
    path: Path,
    judge: Judge,
    sampling: Sampling,
    output: Path,
    count: int,
    scale: float,
    face_encoder: str | None = None,
) -> dict[str, float]:
    """All figures by name; a sheet of the pictures is written to `output / "identity.png"`.

    path: an identity's folder, or a face-id adapter's file.
    face_encoder: what it was trained with, where its file does not tell or it is one's own.
    """
    identity = load_person(path, base.device)
    faces = face_encoder_of(_adapter_of(identity), face_encoder)
    results = measure_identity(base, identity, faces, sampling, count, scale=scale)
    figures: dict[str, float] = {}
    portraits = unseen_portraits(count)
    wanted = truth(portraits.targets)
    for name, result in results.items():
        figures |= {f"{name}: {figure}": value for figure, value in result.figures().items()}
        follows = shares(read(judge, result.images), wanted)
        for attribute in ("style", "setting"):
            figures[f"{name}: {attribute} of the text"] = follows[attribute]
    output.mkdir(parents=True, exist_ok=True)
    sheet(portraits, results).save(output / "identity.png")
    return figures


def _adapter_of(identity: Identity | ImagePromptAdapter) -> ImagePromptAdapter:
    return identity.adapter if isinstance(identity, Identity) else identity


def sheet(
    portraits: Portraits, results: Mapping[str, IdentityResult], count: int = 18
) -> Image.Image:
    """A row each: the reference, then the renders and what was drawn; those wrong are marked."""
    count = min(count, len(portraits.targets))
    cells: list[Image.Image] = pixels_to_images(drawn(portraits.references[:count]))
    labels = ["reference"] * count
    for name, result in results.items():
        cells += pixels_to_images(result.images[:count])
        labels += [name if right else f"({name})" for right in result.is_right[:count].tolist()]
    cells = [cell.resize((96, 96), Image.Resampling.NEAREST) for cell in cells]
    return image_grid(cells, count, [label[:15] for label in labels])
