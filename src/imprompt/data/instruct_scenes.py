"""The five tasks of Instruct on the embedded world: two scenes that share exactly what a task keeps.

    everything    the same scene
    style         the style; object, colour and setting follow the text
    object        the object with its colour and shape; setting and style follow the text
    composition   what stands where and how it is seen; colours, setting and style follow the text
    face          the person; pose, shirt, setting and style follow the text

Lessons come in groups of five, one of each task, which share pictures: the same picture is then asked for
different things, and little is drawn twice.

Source: IP-Adapter-Instruct (2408.03209), section 3.3, whose sets are of photographs and paintings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from numpy.random import Generator

from imprompt.core.randomness import generator
from imprompt.data.instructions import TASKS, filled, instructions
from imprompt.diorama import (
    OBJECT_KINDS,
    SETTINGS,
    STYLES,
    Scene,
    caption,
    everyday_caption,
    phrases,
    sample_scene,
    subject_caption,
    training_scene,
)
from imprompt.diorama.people import PHOTO_LIKE_STYLE, portrait, training_character
from imprompt.diorama.vocabulary import COLOURS, PERSON

FIRST_SCENE_SEED = 20_000_000
CLOSE_UP = 1.2


@dataclass(frozen=True, kw_only=True)
class InstructExample:
    """One lesson: shown `condition`, told `instruction` and `prompt`, draw `target`.

    `kept` says in the words of captions what of the condition the instruction asks for.
    """

    task: str
    condition: Scene
    instruction: str
    prompt: str
    target: Scene
    kept: str


def instruct_example(
    number: int, task: str | None = None, folder: Path | None = None
) -> InstructExample:
    """A lesson as a pure function of its number.

    Without a task they take turns: numbers 5g to 5g + 4 are group g's. With a task, `number` is that
    of the group. Instructions are those of the package, and a user's own in `folder`.

    Raises:
        ImpromptError: no such task, or instructions that cannot be used.
    """
    group = number
    if task is None:
        group, turn = divmod(number, len(TASKS))
        task = TASKS[turn]
    wordings = instructions(task, folder)
    draw = generator(group, 0, f"instruct example, {task}")
    wording = wordings[int(draw.integers(len(wordings)))]
    condition, target, prompt = _MAKERS[task](FIRST_SCENE_SEED + 8 * group, draw)
    return InstructExample(
        task=task,
        condition=condition,
        instruction=filled(wording, condition.kind),
        prompt=prompt,
        target=target,
        kept=kept_in_words(task, condition),
    )


def kept_in_words(task: str, scene: Scene) -> str:
    """What a task keeps of a scene, in the words that captions have for it."""
    said = phrases(scene)
    if task == "everything":
        return caption(scene, 3)
    if task == "style":
        return said.adverb
    if task == "composition":
        # What it is, the prompt says.
        return f"{scene.size} {said.place}"
    return subject_caption(scene)


def _same_style(seed: int) -> Scene:
    return training_scene(seed + 1, style=training_scene(seed).style)


def _everything(seed: int, draw: Generator) -> tuple[Scene, Scene, str]:
    scene = training_scene(seed)
    return scene, scene, everyday_caption(scene, draw)


def _style(seed: int, draw: Generator) -> tuple[Scene, Scene, str]:
    condition, target = training_scene(seed), _same_style(seed)
    said = phrases(target)
    return condition, target, _one_of(draw, f"{said.subject} {said.where}", said.subject)


def _object(seed: int, draw: Generator) -> tuple[Scene, Scene, str]:
    condition = training_scene(seed)
    if condition.kind == PERSON:
        condition = sample_scene(seed, kind=_one_of(draw, *OBJECT_KINDS))
    target = sample_scene(
        seed + 2, kind=condition.kind, colour=condition.colour, shape=condition.shape
    )
    said = phrases(target)
    both = (f"{said.where}, {said.adverb}", f"{said.adverb}, {said.where}")
    prompt = _one_of(draw, *both, f"a {said.noun} {said.where}", said.where, said.adverb)
    return condition, target, prompt


def _composition(seed: int, draw: Generator) -> tuple[Scene, Scene, str]:
    condition = _same_style(seed)
    # The light stays too, so that both are one traced picture, painted twice.
    target = replace(
        condition,
        seed=seed + 3,
        colour=_one_of(draw, *COLOURS),
        style=_one_of(draw, *STYLES),
        setting=_one_of(draw, *SETTINGS),
    )
    said = phrases(target)
    thing = f"{'an' if target.colour[0] in 'aeiou' else 'a'} {target.colour} {target.kind}"
    if target.kind == PERSON:
        thing = f"a person in a {target.colour} shirt"
    prompt = _one_of(
        draw,
        f"{thing} {said.where}, {said.adverb}",
        f"a {said.noun} of {thing} {said.where}",
        f"{said.where}, {thing}, {said.noun}",
    )
    return condition, target, prompt


def _face(seed: int, draw: Generator) -> tuple[Scene, Scene, str]:
    character = training_character(seed + 4)
    # What is known of a person is mostly known from photos.
    seen = {"style": PHOTO_LIKE_STYLE} if draw.random() < 0.5 else {}
    condition = portrait(seed + 4, character, **seen)
    target = portrait(seed + 5, character)
    if draw.random() < 0.5:
        condition = replace(condition, zoom=CLOSE_UP * condition.zoom, offset=0.0)
    said = phrases(target)
    prompt = f"a person in a {target.colour} shirt {said.where}, {said.adverb}"
    return condition, target, prompt


def _one_of(draw: Generator, *choices: str) -> str:
    return choices[int(draw.integers(len(choices)))]


_MAKERS: dict[str, Callable[[int, Generator], tuple[Scene, Scene, str]]] = {
    "everything": _everything,
    "style": _style,
    "object": _object,
    "composition": _composition,
    "face": _face,
}
