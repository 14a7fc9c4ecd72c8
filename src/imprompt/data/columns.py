"""What can be cached of a pair: one function per column.

What is kept and what is computed again follows bytes against work. At 512 px a pair's latent moments are
64 KiB and save 1,117 GFLOP at every visit, an image embedding is 2 KiB and saves 335; the text's states
would be 116 KiB and save 13, so of texts only the token ids are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from PIL import Image
from torch import Tensor

from imprompt.bases import Base, image_encoder_of
from imprompt.core.errors import ImpromptError
from imprompt.core.images import bytes_of_pixels, image_to_pixels
from imprompt.data.filters import Unusable
from imprompt.data.instructions import TASKS
from imprompt.data.pairs import Condition, Pair, draw
from imprompt.diorama import (
    COLOURS,
    KINDS,
    MAP_KINDS,
    NUM_PHRASINGS,
    SETTINGS,
    STYLES,
    Character,
    Render,
    Scene,
    caption,
    character_number,
    draw_maps,
    landmarks_of,
    subject_caption,
)
from imprompt.encoders.face import FaceEncoder, loaded_face_encoder

PIXELS_AT_ONCE = 8 * 512 * 512
"""What the autoencoder sees together: its widest activations take 512 bytes for each, 1 GiB in all."""


@dataclass(frozen=True)
class Batch:
    """Pairs that could be read: pixels (batch, 3, size, size) in [-1, 1], and captions.

    `references` are the pictures that pairs bring besides, None where the image is its own. For
    Instruct `conditions` says what each has as condition, and `condition_pixels` shows it.
    """

    pairs: Sequence[Pair]
    pixels: Tensor
    captions: list[str]
    references: Sequence[object] = ()
    face_encoder: str = "diorama"
    render: Render | None = None
    """All that is known of the pictures, if they are scenes."""
    maps: Sequence[Mapping[str, Image.Image]] = ()
    """Of each pair the control maps that came with it, by kind."""
    conditions: Sequence[Condition] = ()
    condition_pixels: Tensor = field(default_factory=lambda: torch.empty(0, 3, 0, 0))
    framings: Sequence[tuple[int, ...]] = ()
    """Of each pair what was cut out of its image: see `data.pairs.framing_of`."""

    known: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What one column computed and another needs."""

    @cached_property
    def reference_pixels(self) -> Tensor:
        """As `pixels`, of each pair's reference. A scene that is drawn already is not drawn again."""
        drawn = {
            pair.image: i for i, pair in enumerate(self.pairs) if isinstance(pair.image, Scene)
        }
        result = self.pixels.clone()
        others: dict[int, object] = {}
        for row, reference in enumerate(self.references):
            if isinstance(reference, Scene) and reference in drawn:
                result[row] = self.pixels[drawn[reference]]
            elif reference is not None:
                others[row] = reference
        if others:
            result[list(others)] = draw(list(others.values()), self.pixels.shape[-1])[0]
        return result


def default_columns(variant: str) -> tuple[str, ...]:
    """What an image-prompt adapter is trained on; `identity` is InstantID with its IdentityNet.

    Raises:
        ImpromptError: unknown variant.
    """
    features = {
        "base": ("image_embeds",),
        "plus": ("hidden_states",),
        "full": ("hidden_states",),
        "instruct": ("condition_states", "instruction_ids"),
        # With what the instructions ask for in words, which only ground truth knows.
        "instruct-words": ("condition_states", "instruction_ids", "kept_ids", "task_ids"),
        # With who is to be drawn: for faces, and for `likeness`.
        "instruct-faces": ("condition_states", "instruction_ids", "task_ids", "id_embeds"),
        "faceid": ("id_embeds",),
        "faceid-plus": ("id_embeds", "reference_hidden_states"),
        "identity": ("id_embeds", "id_lengths", "landmarks"),
    }
    if variant not in features:
        raise ImpromptError(f"The variant {variant!r} is unknown; choose {', '.join(features)}.")
    return ("latent_mean", "latent_logvar", *features[variant], "text_ids")


def with_framing(base: Base, columns: Sequence[str]) -> tuple[str, ...]:
    """These columns and, beside latents, the framing where the base's denoiser reads it."""
    if base.reads_framing and "latent_mean" in columns and FRAMING not in columns:
        return (*columns, FRAMING)
    return tuple(columns)


def _latent_distribution(base: Base, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, computed once for the columns that are made of them."""
    if "latents" not in batch.known:
        height, width = batch.pixels.shape[-2:]
        parts = batch.pixels.split(max(1, PIXELS_AT_ONCE // (height * width)))
        found = [base.latent_distribution(part) for part in parts]
        batch.known["latents"] = (
            torch.cat([m for m, _ in found]),
            torch.cat([d for _, d in found]),
        )
    return batch.known["latents"]


def latent_mean(base: Base, batch: Batch) -> Tensor:
    """Mean of the autoencoder's posterior, in its own scale: float16 (batch, channels, h, w)."""
    mean, _ = _latent_distribution(base, batch)
    return (mean / base.vae.config.scaling_factor).cpu().half()


def latent_logvar(base: Base, batch: Batch) -> Tensor:
    """Logarithm of the posterior's variance: float16 (batch, channels, h, w)."""
    _, deviation = _latent_distribution(base, batch)
    return (2 * (deviation / base.vae.config.scaling_factor).log()).cpu().half()


def latents(base: Base, batch: Batch) -> Tensor:
    """Mean latents in the denoiser's scale, for training the base: float16."""
    return _latent_distribution(base, batch)[0].cpu().half()


def framing(base: Base, batch: Batch) -> Tensor:
    """Of which picture the latents are which part: float32 (batch, 6), see `TextStates.framing`."""
    return torch.tensor(batch.framings, dtype=torch.float32)


def image_embeds(base: Base, batch: Batch) -> Tensor:
    """The image encoder's projected vector: float16 (batch, dim)."""
    return image_encoder_of(base).embeds(batch.pixels).cpu().half()


def hidden_states(base: Base, batch: Batch) -> Tensor:
    """The image encoder's penultimate states: float16 (batch, length, dim)."""
    return image_encoder_of(base).hidden_states(batch.pixels).cpu().half()


def condition_states(base: Base, batch: Batch) -> Tensor:
    """The image encoder's penultimate states of the condition image: float16 (batch, length, dim)."""
    return image_encoder_of(base).hidden_states(batch.condition_pixels).cpu().half()


def instruction_ids(base: Base, batch: Batch) -> Tensor:
    """Token ids of the instructions: int64 (batch, length)."""
    return base.tokenize([condition.instruction for condition in batch.conditions])


def kept_ids(base: Base, batch: Batch) -> Tensor:
    """Token ids of what the instructions ask for, in words: int64 (batch, length)."""
    return base.tokenize([condition.kept for condition in batch.conditions])


def task_ids(base: Base, batch: Batch) -> Tensor:
    """Numbers of the tasks, -1 where none is named: int64 (batch,)."""
    numbers = {task: number for number, task in enumerate(TASKS)}
    return torch.tensor([numbers.get(condition.task, -1) for condition in batch.conditions])


def text_ids(base: Base, batch: Batch) -> Tensor:
    """Token ids of the captions: int64 (batch, length)."""
    return base.tokenize(batch.captions)


def phrasing_ids(base: Base, batch: Batch) -> Tensor:
    """Token ids of every phrasing of a scene's caption: int64 (batch, phrasings, length)."""
    texts = [caption(scene, i) for scene in _scenes(batch) for i in range(NUM_PHRASINGS)]
    return base.tokenize(texts).unflatten(0, (-1, NUM_PHRASINGS))


def subject_ids(base: Base, batch: Batch) -> Tensor:
    """Token ids of what or whom a scene shows, and nothing else: int64 (batch, length)."""
    return base.tokenize([subject_caption(scene) for scene in _scenes(batch)])


def pixels(base: Base, batch: Batch) -> Tensor:
    """The picture itself: uint8 (batch, 3, size, size)."""
    return bytes_of_pixels(batch.pixels)


def labels(base: Base, batch: Batch) -> Tensor:
    """Class numbers of a scene's kind, colour, style and setting: int64 (batch, 4)."""
    colours = list(COLOURS)
    rows = [
        (
            KINDS.index(scene.kind),
            colours.index(scene.colour),
            STYLES.index(scene.style),
            SETTINGS.index(scene.setting),
        )
        for scene in _scenes(batch)
    ]
    return torch.tensor(rows)


def control(base: Base, batch: Batch, kind: str) -> Tensor:
    """The pictures' control maps of a kind: uint8 (batch, 3, size, size), RGB."""
    if all(kind in maps for maps in batch.maps):
        return bytes_of_pixels(torch.stack([image_to_pixels(maps[kind]) for maps in batch.maps]))
    if batch.render is None:
        raise ImpromptError(
            f"The column {CONTROL}{kind} needs a map for each image: prepare the data with `imprompt "
            f"prepare` and give --map {kind}=FOLDER, whose pictures are named as the images are."
        )
    return (draw_maps(batch.render, kind) * 255).round().to(torch.uint8)


def character(base: Base, batch: Batch) -> Tensor:
    """Which character a portrait shows: int64 (batch,), see `character_number`."""
    return torch.tensor([character_number(_character(scene)) for scene in _scenes(batch)])


def landmarks(base: Base, batch: Batch) -> Tensor:
    """Eyes, nose and corners of the mouth: float32 (batch, 5, 2), fractions of width and height."""
    if all(isinstance(pair.image, Scene) for pair in batch.pairs):
        return landmarks_of([scene for scene in _scenes(batch) if _character(scene)])
    return _faces(batch).landmarks(batch.pixels).cpu().float()


def id_embeds(base: Base, batch: Batch) -> Tensor:
    """Who the reference shows: identity vectors of length 1, float16 (batch, dim).

    Zeros in lessons of Instruct about something else than a face.
    """
    faces, pixels = _faces(batch), batch.reference_pixels
    asked = [row for row in range(len(pixels)) if _is_of_face(batch, row)]
    found = torch.zeros(len(pixels), faces.embed_dim, dtype=torch.float16)
    if asked:
        found[asked] = faces.embeds(pixels[asked]).cpu().half()
    return found


def id_lengths(base: Base, batch: Batch) -> Tensor:
    """Which lengths the vectors of `id_embeds` have as the face encoder gives them: float32 (batch, 1)."""
    embeds = _faces(batch).embeds(batch.reference_pixels, normalized=False)
    return embeds.norm(dim=1, keepdim=True).cpu().float()


def reference_hidden_states(base: Base, batch: Batch) -> Tensor:
    """The image encoder's penultimate states of the reference's face: float16 (batch, length, dim)."""
    crops = _faces(batch).crops(batch.reference_pixels)
    return image_encoder_of(base).hidden_states(crops).cpu().half()


def _is_of_face(batch: Batch, row: int) -> bool:
    return not batch.conditions or batch.conditions[row].is_of_face


def _faces(batch: Batch) -> FaceEncoder:
    return loaded_face_encoder(batch.face_encoder)


def _character(scene: Scene) -> Character:
    if scene.character is None:
        raise ImpromptError(
            f"A {scene.kind} is no character: this column is known of diorama-people:COUNT only."
        )
    return scene.character


def check_kept(condition: Condition | None, columns: Sequence[str]) -> None:
    """Raise Unusable if the words for what is kept are to be a column and the pair has none.

    The states of no words would be learnt as if they said something.
    """
    if "kept_ids" in columns and condition is not None and not condition.kept.strip():
        raise Unusable(KEPT_MISSING, 'no words for what is to be kept: "kept" is missing')


def check_has_encoders(base: Base, columns: Sequence[str]) -> None:
    """Raise an ImpromptError if a column needs an image encoder that the base does not have."""
    if not IMAGE_ENCODER_COLUMNS.isdisjoint(columns):
        image_encoder_of(base)


def _scenes(batch: Batch) -> list[Scene]:
    scenes = [pair.image for pair in batch.pairs if isinstance(pair.image, Scene)]
    if len(scenes) != len(batch.pairs):
        raise ImpromptError(
            "This column is known of diorama scenes only; the source is diorama:COUNT."
        )
    return scenes


COLUMNS: dict[str, Callable[[Base, Batch], Tensor]] = {
    "latent_mean": latent_mean,
    "latent_logvar": latent_logvar,
    "framing": framing,
    "image_embeds": image_embeds,
    "hidden_states": hidden_states,
    "condition_states": condition_states,
    "instruction_ids": instruction_ids,
    "kept_ids": kept_ids,
    "task_ids": task_ids,
    "text_ids": text_ids,
    "latents": latents,
    "phrasing_ids": phrasing_ids,
    "subject_ids": subject_ids,
    "pixels": pixels,
    "labels": labels,
    "character": character,
    "landmarks": landmarks,
    "id_embeds": id_embeds,
    "id_lengths": id_lengths,
    "reference_hidden_states": reference_hidden_states,
}
CONDITION_COLUMNS = frozenset({"condition_states", "instruction_ids", "kept_ids", "task_ids"})
"""Those that can be had of pairs with a condition image only."""
IMAGE_ENCODER_COLUMNS = frozenset(
    {"image_embeds", "hidden_states", "condition_states", "reference_hidden_states"}
)
KEPT_MISSING = "kept missing"
FRAMING = "framing"
"""The column that goes with latents where the base reads it."""
CONTROL = "control_"
"""Begins the names of the columns of control maps; the kind follows: control_depth, …"""


def encoder_of(name: str) -> Callable[[Base, Batch], Tensor]:
    """The function that makes a column.

    Raises:
        ImpromptError: there is no such column.
    """
    if name in COLUMNS:
        return COLUMNS[name]
    if name.startswith(CONTROL) and name != CONTROL:
        return partial(control, kind=name.removeprefix(CONTROL))
    known = [*COLUMNS, *(CONTROL + kind for kind in MAP_KINDS)]
    raise ImpromptError(f"There is no column {name!r}; known are {', '.join(known)}.")
