"""Where pairs of an image and its caption come from.

    photos/                 images with a .txt of the same name beside each
    pairs.json              [{"image_file": "a.jpg", "text": "a dog"}, …], as of the original scripts
    diorama:3000[:SEED]     scenes of the embedded world

A source lists its pairs without opening an image; `load` gives one pair or says why it cannot.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from imprompt.core.errors import ImpromptError
from imprompt.core.images import image_to_pixels, open_image, resize_and_center_crop
from imprompt.core.randomness import generator
from imprompt.diorama import Scene, everyday_caption, render, sample_scene

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MIN_SIDE_PX = 16


@dataclass(frozen=True)
class Pair:
    """One pair before it is opened: a name to show, and how to read its caption and its image."""

    name: str
    read_caption: Callable[[], str]
    image: Path | Scene


def open_pairs(source: str, image_root: Path | None = None) -> list[Pair]:
    """List the pairs of a source, in an order that is always the same.

    `image_root` is what the file names of a JSON list are relative to; by default the list's folder.

    Raises:
        ImpromptError: no such source, or nothing in it.
    """
    if source.startswith("diorama:"):
        return _diorama(source)
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file() and path.suffix.lower() == ".json":
        return _json_list(path, image_root or path.parent)
    raise ImpromptError(
        f"{source!r} is no source of pairs: give a folder of images with .txt captions, a .json list, "
        "or diorama:COUNT."
    )


def _diorama(source: str) -> list[Pair]:
    try:
        numbers = [int(part) for part in source.split(":")[1:]]
        count, first = numbers if len(numbers) == 2 else (numbers[0], 0)
        if count < 1 or first < 0 or len(numbers) > 2:
            raise ValueError
    except (ValueError, IndexError) as error:
        raise ImpromptError(
            f"{source!r}: write diorama:COUNT or diorama:COUNT:FIRST_SEED."
        ) from error
    return [diorama_pair(seed) for seed in range(first, first + count)]


def diorama_pair(seed: int) -> Pair:
    """The scene of a seed, with a caption that tells all of it or a part."""
    scene = sample_scene(seed)
    text = everyday_caption(scene, generator(seed, 0, "caption"))
    return Pair(f"diorama {seed}", lambda: text, scene)


def _folder(folder: Path) -> list[Pair]:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    if not files:
        raise ImpromptError(
            f"{folder} holds no images; known are {', '.join(IMAGE_SUFFIXES)}, each with a .txt."
        )
    return [Pair(str(file.relative_to(folder)), _caption_beside(file), file) for file in files]


def _caption_beside(file: Path) -> Callable[[], str]:
    def read() -> str:
        text = file.with_suffix(".txt")
        if not text.is_file():
            raise ImpromptError(f"no caption: {text.name} is missing")
        try:
            return text.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise ImpromptError(f"the caption {text.name} is not UTF-8") from error

    return read


def _json_list(path: Path, root: Path) -> list[Pair]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ImpromptError(f"{path} is no JSON list: {error}") from error
    if not isinstance(records, list) or not records:
        raise ImpromptError(
            f'{path} must be a list like [{{"image_file": "a.jpg", "text": "a dog"}}].'
        )
    root = root.resolve()
    return [_json_pair(path, number, record, root) for number, record in enumerate(records)]


def _json_pair(path: Path, number: int, record: object, root: Path) -> Pair:
    if not isinstance(record, dict) or not isinstance(record.get("image_file"), str):
        raise ImpromptError(f'Entry {number} of {path} has no "image_file": {str(record)[:80]}')
    file = (root / record["image_file"]).resolve()
    text = record.get("text")

    def read() -> str:
        if not file.is_relative_to(root):
            raise ImpromptError(f"the image lies outside {root}")
        if not isinstance(text, str):
            raise ImpromptError('no caption: "text" is missing')
        return text.strip()

    return Pair(record["image_file"], read, file)


def load(pair: Pair, size_px: int) -> tuple[object, str]:
    """A pair's picture at size_px (a PIL image, or the scene still to be drawn) and its caption.

    Raises:
        ImpromptError: the reason why the pair cannot be used.
    """
    text = pair.read_caption()
    if not text:
        raise ImpromptError("the caption is empty")
    if isinstance(pair.image, Scene):
        return pair.image, text
    image = open_image(pair.image)
    if min(image.size) < MIN_SIDE_PX:
        raise ImpromptError(
            f"the image is {image.width} × {image.height} px; at least {MIN_SIDE_PX} px are needed"
        )
    return resize_and_center_crop(image, size_px), text


def to_pixels(pictures: Sequence[object], size_px: int):
    """Pixels (batch, 3, size_px, size_px) in [-1, 1] of what `load` gave; scenes are drawn together."""
    import torch

    pixels = torch.empty(len(pictures), 3, size_px, size_px)
    scenes = [i for i, picture in enumerate(pictures) if isinstance(picture, Scene)]
    if scenes:
        pixels[scenes] = render([pictures[i] for i in scenes], size_px).pixels  # type: ignore[misc]
    for i, picture in enumerate(pictures):
        if not isinstance(picture, Scene):
            pixels[i] = image_to_pixels(picture)  # type: ignore[arg-type]
    return pixels
