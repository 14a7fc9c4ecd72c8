"""The five tasks of Instruct from a user's own pictures: each builder makes lessons of them.

    everything    the picture itself, with its caption
    object        what stands in a box or a mask, on a coloured ground; the whole picture is the target
    composition   an edge map of the picture, or what an edge-ControlNet draws on it
    style         the picture; the target is what a style-only adapter draws with it
    face          two photos of one person, the one shown as it is or zoomed in

What draws (a ControlNet, an adapter) is a function that the caller gives. `write_lessons` writes pictures
and pairs.jsonl, the list that `imprompt prepare FOLDER/pairs.jsonl data/ --variant instruct` reads.

What is drawn by lot (the instruction, a ground's colour, whether a face is zoomed) follows from the seed and
from what a lesson is made of: other pictures and texts get other ones, the same again the same. Instructions
are those of the package, and a user's own in `folder` (see `data.instructions`).

Source: IP-Adapter-Instruct (2408.03209), section 3.3: how its five sets were made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from numpy.random import Generator
from PIL import Image, ImageFilter, ImageOps

from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import generator
from imprompt.data.instructions import filled, instructions

SMALLEST_SIDE_PX = 16
EDGE_THRESHOLD = 40  # of 255
ZOOM = 1.5

Redraw = Callable[[Image.Image, str], Image.Image]
"""A picture of an edge map and a text: what an edge-ControlNet draws."""
Restyle = Callable[[Image.Image, str], Image.Image]
"""A picture of a style's example and a text: what a style-only adapter draws."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One lesson with pictures; see `data.instruct_scenes.InstructExample` for scenes.

    `kept` says in words what of the condition the instruction asks for, which Instruct's first stage
    learns; `prepare --variant instruct-words` leaves out lessons that do not say it.
    """

    task: str
    condition: Image.Image
    instruction: str
    prompt: str
    target: Image.Image
    kept: str = ""


def instruction_for(task: str, draw: Generator, kind: str = "", folder: Path | None = None) -> str:
    """One of the task's instructions, with the kind of the object in its place; the user's in `folder`, too."""
    wordings = instructions(task, folder)
    return filled(wordings[int(draw.integers(len(wordings)))], kind)


def _chance(task: str, seed: int, image: Image.Image, *told: object) -> Generator:
    """The random numbers of the lesson that is made of this picture and of what is told of it."""
    digest = hashlib.blake2b(image.convert("RGB").tobytes(), digest_size=8)
    digest.update(repr((image.size, *told)).encode("utf-8", "backslashreplace"))
    return generator(seed, int.from_bytes(digest.digest(), "little"), f"{task} lesson")


def everything_lesson(
    image: Image.Image, caption: str, seed: int = 0, *, folder: Path | None = None
) -> Lesson:
    """The picture as its own condition."""
    draw = _chance("everything", seed, image, caption)
    return Lesson(
        task="everything",
        condition=image,
        instruction=instruction_for("everything", draw, folder=folder),
        prompt=caption,
        target=image,
        kept=caption,
    )


def object_lesson(
    image: Image.Image,
    caption: str,
    kind: str,
    *,
    box: tuple[int, int, int, int] | None = None,
    mask: Image.Image | None = None,
    seed: int = 0,
    folder: Path | None = None,
) -> Lesson:
    """What stands in a box (left, top, right, bottom), or is white in a mask, cut out.

    Around a masked object the ground is of one random colour, and so it is where a box is made square.

    Raises:
        ImpromptError: neither or both are given, the box is not in the picture, nothing is in the mask.
    """
    if (box is None) == (mask is None):
        raise ImpromptError("An object is cut out by a box or by a mask: give one of them.")
    shape = None
    if mask is not None:
        if mask.size != image.size:
            raise ImpromptError(f"The mask is of {mask.size}, the picture of {image.size} pixels.")
        shape = mask.convert("L").point([255 * (value > 127) for value in range(256)])
        box = shape.getbbox()
        if box is None:
            raise ImpromptError("Nothing is white in the mask.")
    assert box is not None
    draw = _chance("object", seed, image, caption, kind, *box)
    red, green, blue = (int(part) for part in draw.integers(0, 256, 3))
    image_of_object = image.convert("RGB")
    if shape is not None:
        ground = Image.new("RGB", image.size, (red, green, blue))
        image_of_object = Image.composite(image_of_object, ground, shape)
    left, top, right, bottom = box
    inside = 0 <= left < right <= image.width and 0 <= top < bottom <= image.height
    if not inside or min(right - left, bottom - top) < SMALLEST_SIDE_PX:
        raise ImpromptError(
            f"The box {box} is not in the picture of {image.size} pixels, or smaller than "
            f"{SMALLEST_SIDE_PX}."
        )
    cut = image_of_object.crop(box)
    side = max(cut.size)
    square = ImageOps.pad(cut, (side, side), color=(red, green, blue))
    return Lesson(
        task="object",
        condition=square,
        instruction=instruction_for("object", draw, kind, folder),
        prompt=caption,
        target=image,
        kept=f"a {kind}",
    )


def edges(image: Image.Image) -> Image.Image:
    """White outlines on black, of a picture."""
    found = image.convert("L").filter(ImageFilter.GaussianBlur(1)).filter(ImageFilter.FIND_EDGES)
    inner = found.crop((1, 1, found.width - 1, found.height - 1))  # the border is no edge
    white = inner.point([255 * (value > EDGE_THRESHOLD) for value in range(256)])
    return ImageOps.expand(white, 1, 0).convert("RGB")


def composition_lesson(
    image: Image.Image,
    caption: str,
    *,
    redraw: Redraw | None = None,
    other_caption: str = "",
    kept: str = "",
    seed: int = 0,
    folder: Path | None = None,
) -> Lesson:
    """Another picture of the same outlines as condition: drawn by `redraw`, or the edge map itself.

    `kept` is size and place in words: "small on the left".
    """
    draw = _chance("composition", seed, image, caption, other_caption)
    outlines = edges(image)
    return Lesson(
        task="composition",
        condition=outlines if redraw is None else redraw(outlines, other_caption),
        instruction=instruction_for("composition", draw, folder=folder),
        prompt=caption,
        target=image,
        kept=kept,
    )


def style_lesson(
    image: Image.Image,
    restyle: Restyle,
    prompt: str,
    *,
    kept: str = "",
    seed: int = 0,
    folder: Path | None = None,
) -> Lesson:
    """The picture as example of a style, and what `restyle` draws of the prompt with it.

    `kept` is the style in words: "in oil".
    """
    draw = _chance("style", seed, image, prompt)
    return Lesson(
        task="style",
        condition=image,
        instruction=instruction_for("style", draw, folder=folder),
        prompt=prompt,
        target=restyle(image, prompt),
        kept=kept,
    )


def face_lessons(
    photos: Sequence[tuple[Image.Image, str]],
    *,
    face_boxes: Sequence[tuple[int, int, int, int]] | None = None,
    kept: str = "",
    seed: int = 0,
    folder: Path | None = None,
) -> Iterator[Lesson]:
    """Of one person's photos with captions each in turn, with the next one as condition.

    Half of the conditions are zoomed in: to the face's box (left, top, right, bottom) if it is known,
    else to the middle. `kept` is who it is in words: "a woman with red hair".

    Raises:
        ImpromptError: fewer than two photos.
    """
    if len(photos) < 2:
        raise ImpromptError("A person's lessons need two photos at least.")
    for number, (target, caption) in enumerate(photos):
        other = (number + 1) % len(photos)
        condition = photos[other][0]
        draw = _chance("face", seed, condition, caption)
        if draw.random() < 0.5:
            condition = _zoomed(condition, face_boxes[other] if face_boxes else None)
        yield Lesson(
            task="face",
            condition=condition,
            instruction=instruction_for("face", draw, folder=folder),
            prompt=caption,
            target=target,
            kept=kept,
        )


def _zoomed(image: Image.Image, box: tuple[int, int, int, int] | None) -> Image.Image:
    if box is None:
        side = min(image.size) / ZOOM
        centre = (image.width / 2, image.height / 2)
    else:
        side = min(min(image.size), ZOOM * max(box[2] - box[0], box[3] - box[1]))
        centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    left = round(min(max(centre[0] - side / 2, 0), image.width - side))
    top = round(min(max(centre[1] - side / 2, 0), image.height - side))
    return image.crop((left, top, left + round(side), top + round(side)))


def write_lessons(lessons: Iterable[Lesson], folder: Path) -> Path:
    """Write pictures and the list of pairs; lessons of other calls in the same folder stay.

    Returns:
        The list, for `imprompt prepare LIST data/ --variant instruct`.

    Raises:
        ImpromptError: the folder cannot be written to.
    """
    listed = folder / "pairs.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begun = sum(1 for _ in listed.open(encoding="utf-8")) if listed.exists() else 0
        with listed.open("a", encoding="utf-8") as file:
            for number, lesson in enumerate(lessons, begun):
                names = {part: f"{number:06d}-{part}.png" for part in ("target", "condition")}
                lesson.target.convert("RGB").save(folder / names["target"])
                lesson.condition.convert("RGB").save(folder / names["condition"])
                record = {
                    "image_file": names["target"],
                    "text": lesson.prompt,
                    "condition_image": names["condition"],
                    "instruction": lesson.instruction,
                    "task": lesson.task,
                    "kept": lesson.kept,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ImpromptError(f"Cannot write lessons to {folder}: {error.strerror}.") from error
    return listed
