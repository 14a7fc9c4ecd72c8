"""Pictures of persons: several of one character, who differs from every character of the gallery.

The gallery is who is asked for in measurements. No training sees any of them, in portraits or in
scenes that a person happens to be in (`training_scene`). Its characters differ
from each other visibly, for at 64 pixels a blue eye hardly differs from a green one: in at least two
factors that show in nearly every picture, and in at least three of all eight.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

from imprompt.core.randomness import generator
from imprompt.diorama import vocabulary as words
from imprompt.diorama.scene import Character, Scene, sample_character, sample_scene

PICTURES_PER_CHARACTER = 8
GALLERY_SIZE = 100
PHOTO_LIKE_STYLE = "clay"  # the nearest to a photo of all styles

FACTORS: dict[str, tuple[str, ...]] = {
    "face_shape": words.FACE_SHAPES,
    "skin": tuple(words.SKIN_TONES),
    "hair_shape": words.HAIR_SHAPES,
    "hair_colour": tuple(words.HAIR_COLOURS),
    "eyes": tuple(words.EYE_COLOURS),
    "glasses": words.GLASSES,
    "nose": words.NOSES,
    "beard": words.BEARDS,
}
assert tuple(FACTORS) == tuple(field.name for field in fields(Character))
PLAIN_FACTORS = ("face_shape", "skin", "hair_shape", "hair_colour", "glasses", "beard")
_GALLERY_SEED = 5_000_000
_MIN_PLAIN, _MIN_FACTORS = 2, 3
_STEP = 1_000_003  # to another character, where the one drawn is of the gallery


def character_number(character: Character) -> int:
    """Tells characters apart: 0 … 12,959, the factors as digits."""
    number = 0
    for name, values in FACTORS.items():
        number = number * len(values) + values.index(getattr(character, name))
    return number


def character_of_number(number: int) -> Character:
    """The character with this number."""
    picked: dict[str, str] = {}
    for name, values in reversed(FACTORS.items()):
        number, digit = divmod(number, len(values))
        picked[name] = values[digit]
    return Character(**picked)


def differences(first: Character, second: Character) -> set[str]:
    """The factors in which two characters differ; a hair colour that no hair shows does not count."""
    found = {name for name in FACTORS if getattr(first, name) != getattr(second, name)}
    if all(one.hair_shape == "bald" and one.beard == "no" for one in (first, second)):
        found.discard("hair_colour")
    return found


@cache
def gallery() -> tuple[Character, ...]:
    """The hundred characters of measurements, which no training sees."""
    chosen: list[Character] = []
    seed = _GALLERY_SEED
    while len(chosen) < GALLERY_SIZE:
        character, seed = sample_character(seed), seed + 1
        if all(_are_distinct(character, other) for other in chosen):
            chosen.append(character)
    return tuple(chosen)


def _are_distinct(first: Character, second: Character) -> bool:
    found = differences(first, second)
    return len(found) >= _MIN_FACTORS and len(found & set(PLAIN_FACTORS)) >= _MIN_PLAIN


def training_character(number: int) -> Character:
    """A character that may be trained on: as its seed has it, unless it is one of the gallery."""
    character = sample_character(number)
    while character in gallery():
        number += _STEP
        character = sample_character(number)
    return character


def training_scene(seed: int, **fixed: object) -> Scene:
    """The scene of a seed that may be trained on: a person in it is nobody of the gallery.

    Keyword arguments fix single fields, as of `sample_scene`.
    """
    scene = sample_scene(seed, **fixed)
    if scene.kind == words.PERSON:
        scene = replace(scene, character=training_character(seed))
    return scene


def portrait(seed: int, character: Character, **fixed: object) -> Scene:
    """A person who fills the picture; pose, light, style, setting and shirt follow from the seed.

    Keyword arguments fix single fields, as of `sample_scene`.
    """
    random = generator(seed, 0, "diorama.portrait")
    framing = {
        "zoom": float(random.uniform(0.92, 1.06)),
        "offset": float(random.uniform(-0.14, 0.14)),
    }
    return sample_scene(seed, kind=words.PERSON, character=character, **{**framing, **fixed})


def training_portrait(seed: int) -> Scene:
    """Portrait number `seed`; each aligned run of `PICTURES_PER_CHARACTER` seeds shows one character."""
    return portrait(seed, training_character(seed // PICTURES_PER_CHARACTER))


def reference_seed(seed: int) -> int:
    """The seed of another portrait of the same character."""
    first = seed - seed % PICTURES_PER_CHARACTER
    return first + (seed + 1 - first) % PICTURES_PER_CHARACTER
