"""Characters that no training sees: who is asked for, in which pictures, and who is seen in others.

Each of the gallery's hundred characters is given by one picture, and asked for in a pose, light, style
and setting that this picture does not have. Who is seen in what was drawn, a face encoder says: the
character whose pictures are nearest. That encoder, the face judge, was trained apart from the one whose
vectors ask for a person, so that a generator cannot please the judge by what only its own encoder sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as functional
from jaxtyping import Float, Int
from torch import Tensor

from imprompt.core.randomness import generator
from imprompt.core.shipped import shipped
from imprompt.diorama import (
    FACTORS,
    SETTINGS,
    STYLES,
    Character,
    Scene,
    gallery,
    landmarks_of,
    portrait,
    portrait_caption,
    render,
)
from imprompt.diorama.held_out import UNSEEN_PORTRAITS
from imprompt.diorama.people import PHOTO_LIKE_STYLE
from imprompt.encoders.face import FaceEncoder, load_face_encoder

FIRST_REFERENCE, FIRST_TARGET, FIRST_TEMPLATE = 0, 100_000, 200_000
OTHER_REFERENCE_STYLE = "cartoon"  # for portraits that are asked for in the photo-like one


def load_face_judge() -> FaceEncoder:
    """The face encoder that judges pictures and conditions none."""
    return load_face_encoder(shipped("diorama-face-judge.safetensors"))


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
    """`count` portraits, of the gallery's characters in turn, in each of the styles as often.

    Each reference shows the character in another style and setting.
    """
    people = gallery()
    targets = [
        portrait(
            UNSEEN_PORTRAITS[FIRST_TARGET + i],
            people[i % len(people)],
            style=styles[i % len(styles)],
        )
        for i in range(count)
    ]
    references = [
        _reference(i, people[i % len(people)], target) for i, target in enumerate(targets)
    ]
    return Portraits(people, targets, references)


def _reference(number: int, character: Character, target: Scene) -> Scene:
    style = OTHER_REFERENCE_STYLE if target.style == PHOTO_LIKE_STYLE else PHOTO_LIKE_STYLE
    reference = portrait(UNSEEN_PORTRAITS[FIRST_REFERENCE + number], character, style=style)
    if reference.setting == target.setting:
        following = SETTINGS[(SETTINGS.index(target.setting) + 1) % len(SETTINGS)]
        reference = replace(reference, setting=following)
    return reference


def drawn(scenes: Sequence[Scene]) -> Float[Tensor, "scenes 3 64 64"]:
    """Pixels of scenes, a few at a time."""
    parts = [render(list(scenes[i : i + 8])).pixels for i in range(0, len(scenes), 8)]
    return torch.cat(parts)


def templates(
    faces: FaceEncoder, characters: Sequence[Character]
) -> Float[Tensor, "characters dim"]:
    """What each character is known by: the mean direction of a picture in each style."""
    scenes = [
        portrait(UNSEEN_PORTRAITS[FIRST_TEMPLATE + len(STYLES) * i + k], character, style=style)
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
    face_judge: FaceEncoder,
    known_by: Float[Tensor, "characters dim"],
) -> IdentityResult:
    """Who is in these pictures, and how far is the face from where it was asked for?

    known_by: the judge's `templates`.
    """
    found = (face_judge.embeds(images) @ known_by.T).argmax(1)
    numbers = {character: i for i, character in enumerate(portraits.characters)}
    wanted = [numbers[scene.character] for scene in portraits.targets if scene.character]
    offset = (face_judge.landmarks(images) - landmarks_of(portraits.targets)) * images.shape[-1]
    return IdentityResult(
        images,
        found,
        torch.tensor(wanted),
        offset.norm(dim=2).mean(1),
        portraits.characters,
        [scene.style for scene in portraits.targets],
    )
