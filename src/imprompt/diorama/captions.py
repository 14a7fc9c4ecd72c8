"""Captions of scenes: in several phrasings that all say the same, and as people write them, in part."""

from __future__ import annotations

from dataclasses import dataclass

from numpy.random import Generator

from imprompt.diorama.scene import Character, Scene
from imprompt.diorama.vocabulary import PERSON

_STYLE_PHRASES = {
    "clay": ("clay model", "made of clay"),
    "cartoon": ("cartoon", "as a cartoon"),
    "line art": ("line art drawing", "as line art"),
    "neon": ("neon sign picture", "in neon light"),
    "watercolor": ("watercolor painting", "as a watercolor"),
    "crayon": ("crayon drawing", "in crayon"),
}
_SETTING_PHRASES = {
    "meadow": "in a meadow",
    "desert": "in the desert",
    "snow": "in the snow",
    "night": "at night",
    "studio": "in a studio",
}
_PLACEMENT_PHRASES = {"left": "on the left", "center": "in the center", "right": "on the right"}

NUM_PHRASINGS = 6


def caption(scene: Scene, phrasing: int = 0) -> str:
    """Describe a scene in words. `phrasing` picks one of `NUM_PHRASINGS` wordings (taken modulo).

    Phrasings 0 to 2 name subject, colour, style and setting; 3 and 4 also size and placement;
    5 is terse and leaves the setting out.
    """
    noun, adverb = _STYLE_PHRASES[scene.style]
    subject = _subject(scene)
    sized = _subject(scene, scene.size)
    where = _SETTING_PHRASES[scene.setting]
    place = _PLACEMENT_PHRASES[scene.placement]
    return (
        f"{subject} {where}, {adverb}",
        f"a {noun} of {subject} {where}",
        f"{where}, {subject}, {noun}",
        f"{sized} {place}, {where}, {adverb}",
        f"a {noun} of {sized} {place} {where}",
        f"{subject}, {adverb}",
    )[phrasing % NUM_PHRASINGS]


def subject_caption(scene: Scene) -> str:
    """Only what a scene shows, "a red house", or whom: "a person with long black hair and tan skin"."""
    if scene.character is not None:
        return f"a person with {_looks(scene.character)}"
    return _subject(scene)


# How often a caption says what. A caption that says everything makes its image redundant as a
# prompt; that few do is what lets adapters learn to take from an image what a text leaves open.
_SHARES = {"all": 0.3, "subject": 0.35, "subject and setting": 0.1, "style": 0.15, "setting": 0.1}


def everyday_caption(scene: Scene, draw: Generator) -> str:
    """A caption as people write them: now and then complete, mostly about one thing ("a duck")."""
    said = draw.choice(list(_SHARES), p=list(_SHARES.values()))
    subject = f"{'an' if scene.kind[0] in 'aeiou' else 'a'} {scene.kind}"
    where = _SETTING_PHRASES[scene.setting]
    if said == "all":
        return caption(scene, int(draw.integers(NUM_PHRASINGS)))
    if said == "subject":
        return subject
    if said == "subject and setting":
        return f"{subject} {where}"
    return where if said == "setting" else _STYLE_PHRASES[scene.style][1]


@dataclass(frozen=True)
class Phrases:
    """The parts of a scene's captions."""

    subject: str
    """such as: a red house"""
    noun: str
    """of the style, such as: cartoon"""
    adverb: str
    """of the style, such as: as a cartoon"""
    where: str
    """the setting, such as: in the snow"""
    place: str
    """in the picture, such as: on the left"""


def phrases(scene: Scene) -> Phrases:
    """What captions say of a scene, part by part, for texts that say some of it only."""
    noun, adverb = _STYLE_PHRASES[scene.style]
    return Phrases(
        subject=_subject(scene),
        noun=noun,
        adverb=adverb,
        where=_SETTING_PHRASES[scene.setting],
        place=_PLACEMENT_PHRASES[scene.placement],
    )


def portrait_caption(scene: Scene, draw: Generator) -> str:
    """A caption of a portrait that leaves to an image prompt who it is: shirt, setting and style."""
    noun, adverb = _STYLE_PHRASES[scene.style]
    where = _SETTING_PHRASES[scene.setting]
    person = "a person" if draw.random() < 0.3 else f"a person in a {scene.colour} shirt"
    return (
        f"{person} {where}, {adverb}",
        f"a {noun} of {person} {where}",
        f"{where}, {person}, {noun}",
        f"{person}, {adverb}",
    )[int(draw.integers(4))]


def _subject(scene: Scene, size: str = "") -> str:
    adjective = f"{size} " if size else ""
    if scene.kind == PERSON:
        assert scene.character is not None
        return f"a {adjective}person in a {scene.colour} shirt with {_looks(scene.character)}"
    words = f"{adjective}{scene.colour} {scene.kind}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _looks(character: Character) -> str:
    if character.hair_shape == "bald":
        parts = ["a bald head"]
    else:
        parts = [f"{character.hair_shape} {character.hair_colour} hair"]
    if character.glasses != "no":
        parts.append("glasses")
    if character.beard != "no":
        parts.append("a beard")
    parts.append(f"{character.skin} skin")
    return ", ".join(parts[:-1]) + f" and {parts[-1]}"
