"""Is what was asked of an image taken from it, and is all else left to the text?

Each of the five tasks is measured on unseen lessons, with instructions drawn from those that come with
the package. The judge reads object, colour, style and setting off what was drawn; a face judge says
who it is, among a hundred; a map reader, what stands where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imprompt.adapters import ImagePromptAdapter
from imprompt.bases import Base, image_encoder_of
from imprompt.data.instruct_scenes import InstructExample, instruct_example
from imprompt.data.instructions import TASKS
from imprompt.diorama import caption, phrases, render
from imprompt.diorama.held_out import UNSEEN_LESSONS
from imprompt.diorama.vocabulary import PERSON
from imprompt.encoders.instruction import METADATA_KEY, instruction_states
from imprompt.evaluation.clip_scores import ClipScores, mean_cosine
from imprompt.evaluation.judge import read, truth
from imprompt.evaluation.map_reader import compare, load_map_reader, read_maps
from imprompt.evaluation.measure import Sampling, draw
from imprompt.evaluation.portraits import load_face_judge, templates, unseen_portraits
from imprompt.generation.conditions import TokenPrompt
from imprompt.systems.classifier import Judge
from imprompt.systems.map_reader import MapReader

KEPT = {
    "everything": ("kind", "colour", "style", "setting"),
    "style": ("style",),
    "object": ("kind", "colour"),
    "composition": (),
    "face": (),
}
FOLLOWED = {
    "everything": (),
    "style": ("kind", "colour"),
    "object": ("style", "setting"),
    "composition": ("colour", "style", "setting"),
    "face": ("colour", "style", "setting"),
}


def unseen_lessons(task: str, count: int) -> list[InstructExample]:
    """Lessons of one task that no training sees, whose text says all that the image must not."""
    if task == "face":
        portraits = unseen_portraits(count)
        lessons = [instruct_example(UNSEEN_LESSONS[i], task) for i in range(count)]
        return [
            replace(
                lesson,
                condition=reference,
                target=target,
                prompt=f"a person in a {target.colour} shirt {phrases(target).where}, "
                f"{phrases(target).adverb}",
            )
            for lesson, reference, target in zip(
                lessons, portraits.references, portraits.targets, strict=True
            )
        ]
    found: list[InstructExample] = []
    for group in UNSEEN_LESSONS:
        if len(found) == count:
            break
        lesson = instruct_example(group, task)
        # A person's shirt is no object colour, and has no kind to be told by.
        if PERSON not in (lesson.condition.kind, lesson.target.kind):
            found.append(replace(lesson, prompt=_prompt(lesson)))
    return found


def _prompt(lesson: InstructExample) -> str:
    said = phrases(lesson.target)
    if lesson.task == "everything":
        return ""
    if lesson.task == "style":
        return f"{said.subject} {said.where}"
    if lesson.task == "object":
        return f"{said.where}, {said.adverb}"
    return f"{said.subject} {said.where}, {said.adverb}"


def lesson_prompt(
    base: Base,
    adapter: ImagePromptAdapter,
    handle,
    references: Tensor,
    lessons: Sequence[InstructExample],
    scale: float,
) -> TokenPrompt:
    """The image prompt of each lesson, for one batch of generations."""
    encoder = image_encoder_of(base)
    embedding = adapter.metadata.get(METADATA_KEY, "tokens")
    told = instruction_states(base, [lesson.instruction for lesson in lessons], embedding)
    texts = base.instruct_states([lesson.prompt for lesson in lessons])
    silent, empty = instruction_states(base, [""], embedding), base.instruct_states([""])
    states = encoder.hidden_states(references)
    return TokenPrompt(
        handle=handle,
        tokens=adapter.tokens(states, told, texts),
        zero_tokens=adapter.tokens(encoder.zero_hidden_states(), silent, empty),
        scale=scale,
    )


@dataclass(frozen=True)
class TaskResult:
    """What was drawn for the lessons of a task, and shares in [0, 1] by name."""

    lessons: list[InstructExample]
    references: Tensor
    images: Tensor
    figures: dict[str, float]


@torch.no_grad()
def measure_task(
    base: Base,
    adapter: ImagePromptAdapter,
    judge: Judge,
    sampling: Sampling,
    task: str,
    count: int = 48,
    scale: float = 1.0,
    clip: ClipScores | None = None,
    lessons: list[InstructExample] | None = None,
) -> TaskResult:
    """Draw what unseen lessons of a task ask for, and measure what was kept and what followed."""
    lessons = unseen_lessons(task, count) if lessons is None else lessons
    references = render([lesson.condition for lesson in lessons], base.image_size_px).pixels
    with adapter.install(base.unet) as handle:
        prompt = lesson_prompt(base, adapter, handle, references, lessons, scale)
        images = draw(base, [lesson.prompt for lesson in lessons], [prompt], sampling)
    figures = judged(judge, task, lessons, images)
    if task == "composition":
        figures |= layout_figures(load_map_reader(), images, lessons)
    if task == "face":
        faces = load_face_judge()
        people = unseen_portraits(1).characters
        found = (faces.embeds(images) @ templates(faces, people).T).argmax(1).tolist()
        right = [
            people[number] == x.target.character for number, x in zip(found, lessons, strict=True)
        ]
        figures["kept: character, of 100"] = sum(right) / len(right)
    if clip is not None:
        figures |= clip_figures(clip, lessons, references, images)
    return TaskResult(lessons, references, images, figures)


def judged(
    judge: Judge, task: str, lessons: Sequence[InstructExample], images: Tensor
) -> dict[str, float]:
    """What the judge finds kept of the reference, and followed of the text."""
    found = read(judge, images)
    kept = truth([lesson.condition for lesson in lessons])
    followed = truth([lesson.target for lesson in lessons])
    figures: dict[str, float] = {}
    for name, attributes, wanted in (
        ("kept", KEPT[task], kept),
        ("text", FOLLOWED[task], followed),
    ):
        right = [found[attribute] == wanted[attribute] for attribute in attributes]
        for attribute, one in zip(attributes, right, strict=True):
            figures[f"{name}: {attribute}"] = one.float().mean().item()
        if len(right) > 1:
            figures[f"{name}: all at once"] = torch.stack(right).all(0).float().mean().item()
    return figures


def clip_figures(
    clip: ClipScores, lessons: Sequence[InstructExample], references: Tensor, images: Tensor
) -> dict[str, float]:
    """CLIP-I to the reference, -T to its caption, -P to the prompt, -S to its style in words.

    Source: the scores of IP-Adapter-Instruct (2408.03209), table 1, by the base's own CLIP.
    """
    drawn = clip.of_images(images)
    texts = {
        "CLIP-T": [caption(lesson.condition, 0) for lesson in lessons],
        "CLIP-P": [lesson.prompt for lesson in lessons],
        "CLIP-S": [phrases(lesson.condition).adverb for lesson in lessons],
    }
    figures = {"CLIP-I": mean_cosine(drawn, clip.of_images(references))}
    return figures | {name: mean_cosine(drawn, clip.of_texts(x)) for name, x in texts.items()}


def layout_figures(
    reader: MapReader, images: Tensor, lessons: Sequence[InstructExample]
) -> dict[str, float]:
    """Mean overlap of what stands in a picture with what stands in its reference, as a map reader sees it.

    layout IoU: all that is not background or ground as one; layout IoU of parts: the mean of the parts.
    """
    wanted = render([lesson.condition for lesson in lessons], images.shape[-1])
    agreement = compare(read_maps(reader, images), wanted)
    return {
        "layout IoU": agreement["object IoU"],
        "layout IoU of parts": agreement["segmentation IoU"],
    }


def measure_instruct(
    base: Base,
    adapter: ImagePromptAdapter,
    judge: Judge,
    sampling: Sampling,
    count: int = 48,
    scale: float = 1.0,
) -> dict[str, float]:
    """All figures of all tasks, by name."""
    clip = ClipScores(base)
    figures: dict[str, float] = {}
    for task in TASKS:
        result = measure_task(base, adapter, judge, sampling, task, count, scale, clip)
        figures |= {f"{task}: {name}": value for name, value in result.figures.items()}
    limits = layout_limits(base, sampling, count)
    return figures | {f"composition: {name}": x for name, x in limits.items()}


@torch.no_grad()
def layout_limits(base: Base, sampling: Sampling, count: int = 48) -> dict[str, float]:
    """Between what the layouts of compositions lie: those that the text alone gives, and true renders'."""
    lessons = unseen_lessons("composition", count)
    compared = {
        "true renders": render([lesson.target for lesson in lessons], base.image_size_px).pixels,
        "the text alone": draw(base, [lesson.prompt for lesson in lessons], (), sampling),
    }
    reader = load_map_reader()
    return {
        f"{name} of {images}": value
        for images, pixels in compared.items()
        for name, value in layout_figures(reader, pixels, lessons).items()
    }
