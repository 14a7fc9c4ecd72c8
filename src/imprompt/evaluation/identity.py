"""Is the person kept, and is the face where it was asked for? Measured on characters never trained on.

Each of the gallery's hundred characters is given by one picture, and asked for in a pose, light, style
and setting that this picture does not have. Who is seen in what was drawn, a face encoder says: the
character whose pictures are nearest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from imprompt.bases import Base
from imprompt.checkpoints.identity import Identity, load_identity
from imprompt.core.images import image_grid, pixels_to_images
from imprompt.core.randomness import generator
from imprompt.diorama import (
    FACTORS,
    STYLES,
    Character,
    Scene,
    gallery,
    landmarks_of,
    portrait,
    portrait_caption,
    render,
)
from imprompt.encoders.face import FaceEncoder
from imprompt.encoders.landmarks import landmark_images
from imprompt.evaluation.judge import read, shares, truth
from imprompt.evaluation.measure import Sampling, draw
from imprompt.generation.conditions import TokenPrompt
from imprompt.generation.faces import (
    face_encoder_of,
    face_features,
    face_features_of_nothing,
)
from imprompt.generation.identity import net_control
from imprompt.systems.classifier import Judge

REFERENCE_SEED, TARGET_SEED, TEMPLATE_SEED = 6_000_000, 6_100_000, 6_200_000
REFERENCE_STYLE = "clay"  # the one nearest to a photo

@dataclass(frozen=True)
class Portraits:
    """Who is asked for and how: a scene of each character as it shall be drawn, and a reference."""

    characters: tuple[Character, ...]
    targets: list[Scene]
    references: list[Scene]

    @property
    def texts(self) -> list[str]:
        """Captions of the targets, which do not say who it is."""
        return [
            portrait_caption(scene, generator(scene.seed, 0, "caption")) for scene in self.targets
        ]


def unseen_portraits(count: int, styles: Sequence[str] = STYLES) -> Portraits:
    """`count` portraits, of the gallery's characters in turn, in each of the styles as often."""
    people = gallery()
    numbers = range(count)
    return Portraits(
        people,
        [
            portrait(TARGET_SEED + i, people[i % len(people)], style=styles[i % len(styles)])
            for i in numbers
        ],
        [
            portrait(REFERENCE_SEED + i, people[i % len(people)], style=REFERENCE_STYLE)
            for i in numbers
        ],
    )


def drawn(scenes: Sequence[Scene]) -> Float[Tensor, "scenes 3 64 64"]:
    """Pixels of scenes, a few at a time."""
    parts = [render(list(scenes[i : i + 8])).pixels for i in range(0, len(scenes), 8)]
    return torch.cat(parts)


def templates(
    faces: FaceEncoder, characters: Sequence[Character]
) -> Float[Tensor, "characters dim"]:
    """What each character is known by: the mean direction of a picture in each style."""
    scenes = [
        portrait(TEMPLATE_SEED + len(STYLES) * i + k, character, style=style)
        for i, character in enumerate(characters)
        for k, style in enumerate(STYLES)
    ]
    embeds = faces.embeds(drawn(scenes)).unflatten(0, (-1, len(STYLES)))
    return functional.normalize(embeds.mean(1), dim=1)


@dataclass(frozen=True)
class IdentityResult:
    """What was drawn and what was read off it.

    found: the number of the nearest character; wanted: that of the right one.
    errors_px: mean distance of the five landmarks from where they were asked for, per picture.
    """

    images: Tensor
    found: Int[Tensor, " pictures"]
    wanted: Int[Tensor, " pictures"]
    errors_px: Float[Tensor, " pictures"]
    characters: tuple[Character, ...]
    styles: list[str]

    @property
    def is_right(self) -> Tensor:
        return self.found == self.wanted

    def figures(self) -> dict[str, float]:
        """The share of pictures with the right character, with each of its factors, per style; and px."""
        right = self.is_right.float()
        figures = {"right character": right.mean().item()}
        for name in FACTORS:
            same = [
                getattr(self.characters[f], name) == getattr(self.characters[w], name)
                for f, w in zip(self.found.tolist(), self.wanted.tolist(), strict=True)
            ]
            figures[f"right {name}"] = sum(same) / len(same)
        for style in dict.fromkeys(self.styles):
            of_style = torch.tensor([one == style for one in self.styles])
            figures[f"right character, {style}"] = right[of_style].mean().item()
        figures["landmark error in px"] = self.errors_px.mean().item()
        figures["landmark error in px, median"] = self.errors_px.median().item()
        return figures


def judge_identity(
    images: Float[Tensor, "pictures 3 h w"],
    portraits: Portraits,
    faces: FaceEncoder,
    known_by: Float[Tensor, "characters dim"],
    landmark_reader: FaceEncoder | None = None,
) -> IdentityResult:
    """Who is in these pictures, and how far is the face from where it was asked for?"""
    found = (faces.embeds(images) @ known_by.T).argmax(1)
    numbers = {character: i for i, character in enumerate(portraits.characters)}
    wanted = [numbers[scene.character] for scene in portraits.targets if scene.character]
    places = (landmark_reader or faces).landmarks(images)
    offset = (places - landmarks_of(portraits.targets)) * images.shape[-1]
    return IdentityResult(
        images,
        found,
        torch.tensor(wanted),
        offset.norm(dim=2).mean(1),
        portraits.characters,
        [scene.style for scene in portraits.targets],
    )


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


def draw_identity(
    base: Base,
    identity: Identity,
    faces: FaceEncoder,
    portraits: Portraits,
    sampling: Sampling,
    *,
    without: Without | None = None,
    scale: float = 1.0,
    net_weight: float = 1.0,
) -> Tensor:
    """Pixels of the portraits that are asked for, drawn from references, landmarks and captions."""
    without = without or Without()
    adapter = identity.adapter
    pixels = drawn(portraits.references)
    features = face_features(adapter, list(pixels), faces, base.image_encoder)
    with torch.no_grad(), adapter.install(base.unet) as handle:
        tokens = adapter.tokens(*features)
        zero = adapter.tokens(*face_features_of_nothing(adapter, base.image_encoder))
        prompts = [TokenPrompt(handle=handle, tokens=tokens, zero_tokens=zero, scale=scale)]
        size_px = base.image_size_px
        maps = landmark_images(landmarks_of(portraits.targets), size_px, size_px)
        controls = [net_control(identity, base, tokens, zero, maps, weight=net_weight)]
        return draw(
            base,
            portraits.texts,
            [] if without.adapter else prompts,
            sampling,
            controls=[] if without.net else controls,
        )


def measure_identity(
    base: Base,
    identity: Identity,
    faces: FaceEncoder,
    sampling: Sampling,
    count: int = 100,
    *,
    scale: float = 1.0,
    ablations: Sequence[str] = tuple(ABLATIONS),
    landmark_reader: FaceEncoder | None = None,
) -> dict[str, IdentityResult]:
    """Renders of what was asked for (the best that can be reached), then what is drawn, by ablation."""
    portraits = unseen_portraits(count)
    known_by = templates(faces, portraits.characters)
    results = {
        "renders": judge_identity(
            drawn(portraits.targets), portraits, faces, known_by, landmark_reader
        )
    }
    for name in ablations:
        images = draw_identity(
            base, identity, faces, portraits, sampling, without=ABLATIONS[name], scale=scale
        )
        results[name] = judge_identity(images, portraits, faces, known_by, landmark_reader)
    return results


def evaluate_identity(
    base: Base,
    folder: Path,
    judge: Judge,
    sampling: Sampling,
    output: Path,
    count: int,
    scale: float,
) -> dict[str, float]:
    """All figures by name; a sheet of the pictures is written to `output / "identity.png"`."""
    identity = load_identity(folder)
    faces = face_encoder_of(identity.adapter)
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


def sheet(
    portraits: Portraits, results: Mapping[str, IdentityResult], count: int = 18
) -> Image.Image:
    """A row each: the reference, then the renders and what was drawn; those wrong are marked."""
    count = min(count, len(portraits.targets))
    cells: list[Image.Image] = pixels_to_images(drawn(portraits.references[:count]))
    labels = ["reference"] * count
    for name, result in results.items():
        cells += pixels_to_images(result.images[:count])
        labels += [
            name if right else f"({name})" for right in result.is_right[:count].tolist()
        ]
    cells = [cell.resize((96, 96), Image.Resampling.NEAREST) for cell in cells]
    return image_grid(cells, count, [label[:15] for label in labels])
