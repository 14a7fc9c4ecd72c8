"""A pair of an image and its caption, before it is opened; and reading it, or saying why not.

    photos/                 images with a .txt (or .json) of the same name beside each, tars among them
    shard.tar               an archive of img2dataset or webdataset; a folder of them is one source
    pairs.json              [{"image_file": "a.jpg", "text": "a dog"}, …]; also .jsonl, .csv, .tsv, .parquet
    dataset/                a Hugging Face dataset as `save_to_disk` leaves it
    diorama:3000[:SEED]     scenes of the embedded world
    diorama-instruct:3000   two scenes and an instruction that says what they share
    diorama-people:3000     its portraits, each with another one of the same person

A source lists its pairs without opening an image. Nothing is ever unpacked or written there.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from imprompt.core.errors import ImpromptError
from imprompt.core.images import (
    center_crop,
    image_to_pixels,
    open_image,
    resize_and_center_crop,
)
from imprompt.data.filters import Filters, Unusable
from imprompt.diorama import Render, Scene, render

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_IMAGE_BYTES = 512_000_000
MAX_CAPTION_BYTES = 1_000_000
CAPTION_KEYS = ("text", "caption", "captions", "prompt", "alt_text")


ImageSource = Path | Scene | Callable[[], bytes]
"""A file, a scene still to be drawn, or a function that gives the bytes of an image file."""


@dataclass(frozen=True)
class Condition:
    """What a pair of Instruct has besides: another image, and what is to be taken from it.

    `task` is one of those in `data.instructions`, or empty; `kept` says in words what of the image
    the instruction asks for, where someone knows it.
    """

    image: ImageSource
    instruction: str
    task: str = ""
    kept: str = ""

    @property
    def is_of_face(self) -> bool:
        """Whether a person may be meant: the task is faces, or is not told."""
        return self.task in ("", "face")


@dataclass(frozen=True)
class Pair:
    """One pair before it is opened: a name to show, and how to read its caption and its image.

    `reference` is another picture, where what is learned is to go from that one to the image;
    `read_condition` tells what a pair of Instruct has.
    """

    name: str
    read_caption: Callable[[], str]
    image: ImageSource
    read_scores: Callable[[], Mapping[str, Any]] = field(default=dict)
    reference: ImageSource | None = None
    maps: Mapping[str, Path] = field(default_factory=dict)
    """Pictures that show the same as the image in another way, by kind; scenes need none."""
    read_condition: Callable[[], Condition] | None = None


@dataclass(frozen=True)
class Part:
    """A stretch of a source that one process works on, and that can be read on its own.

    `num_pairs` may be an estimate; `identity` changes when what is listed changes.
    """

    name: str
    num_pairs: int
    identity: str
    pairs: Callable[[], Sequence[Pair]]


@dataclass(frozen=True)
class Loaded:
    """A pair that can be used. `content` tells the image with its reference or condition, if it has
    one (and if wanted the caption), from others.

    `framing` is what was cut out of the image, see `framing_of`.
    """

    picture: object
    caption: str
    content: int
    framing: tuple[int, ...]
    reference: object = None
    maps: Mapping[str, Image.Image] = field(default_factory=dict)
    condition: Condition | None = None
    condition_picture: object = None


@dataclass(frozen=True)
class _Refusal:
    kind: str
    reason: str

    def __call__(self) -> NoReturn:
        raise Unusable(self.kind, self.reason)


def faulty(name: str, kind: str, reason: str) -> Pair:
    """A pair of which listing alone tells that it cannot be used."""
    refusal = _Refusal(kind, reason)
    return Pair(shown(name), refusal, refusal)


def shown(name: str) -> str:
    """A file's name as text that can be printed and stored, whatever bytes it is made of."""
    return name.encode("utf-8", "backslashreplace").decode()


def identity_of(*names: object) -> str:
    """16 hexadecimal digits that change when a listing changes."""
    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        digest.update(str(name).encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()


def read_file(path: Path, max_bytes: int, kind: str) -> bytes:
    """The bytes of a regular file.

    Raises:
        Unusable: it is missing, a broken or circular link, no regular file, or too large.
    """
    try:
        # Without the flag, opening a named pipe would wait forever for someone to write to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise Unusable(kind, f"{shown(path.name)} is no regular file")
            check_size(path.name, found.st_size, max_bytes, kind)
            return file.read()
    except FileNotFoundError as error:
        why = "is a link to nothing" if path.is_symlink() else "is missing"
        raise Unusable(kind, f"{shown(path.name)} {why}") from error
    except OSError as error:
        raise Unusable(
            kind, f"{shown(path.name)} cannot be read: {os.strerror(error.errno or 0)}"
        ) from error


def check_size(name: str, num_bytes: int, max_bytes: int, kind: str) -> None:
    if num_bytes > max_bytes:
        raise Unusable(
            kind, f"{shown(name)} has {num_bytes:,} bytes; at most {max_bytes:,} are read"
        )


def decode_caption(content: bytes, name: str, key: str | None = None) -> str:
    """Text of the bytes of a .txt, or the caption in a .json, which may be under another key."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable("caption encoding", f"the caption {shown(name)} is not UTF-8") from error
    return caption_of(decode_record(text, name), key) if name.endswith(".json") else text


def decode_record(text: str | bytes, name: str) -> Mapping[str, Any]:
    """The JSON object beside an image, as img2dataset writes it."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable("caption missing", f"{shown(name)} is no JSON") from error
    if not isinstance(record, dict):
        raise Unusable("caption missing", f"{shown(name)} holds no JSON object")
    return record


def caption_of(record: Mapping[str, Any], key: str | None = None) -> str:
    """The caption in a record; of a list of captions the first.

    Raises:
        Unusable: the record has none.
    """
    value = record.get(key) if key else first_of(record, CAPTION_KEYS)
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise Unusable("caption missing", f'no caption: "{key or CAPTION_KEYS[0]}" is missing')
    return value


def first_of(record: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value under the first of these keys that is there, in capitals or not."""
    lowered = {str(key).lower(): value for key, value in record.items()}
    return next((lowered[key] for key in keys if lowered.get(key) is not None), None)


def load(
    pair: Pair, size_px: int, filters: Filters | None = None, *, with_condition: bool = False
) -> Loaded:
    """A pair's picture at size_px (a PIL image, or the scene still to be drawn) and its caption.

    With `with_condition`, also what it has for Instruct.

    Raises:
        Unusable: the reason why the pair cannot be used.
    """
    filters = Filters() if filters is None else filters
    try:
        caption = filters.check_caption(pair.read_caption())
        if filters.scores:
            filters.check_scores(pair.read_scores())
        reference: object = pair.reference
        of_reference: list[bytes] = []
        if reference is not None and not isinstance(reference, Scene):
            name = reference.name if isinstance(reference, Path) else f"reference of {pair.name}"
            opened = _open(reference, name, size_px, None, "reference missing")
            reference, of_reference = opened.picture, [opened.content]
        image = _open(pair.image, pair.name, size_px, filters)
        framing = framing_of(image.size, size_px)
        maps = {k: _read_map(file, k, image.size, size_px) for k, file in pair.maps.items()}
        # The same image may be asked for in several ways: from other references, by instructions.
        if not with_condition:
            number = _content([image.content, *of_reference], caption, filters)
            return Loaded(image.picture, caption, number, framing, reference, maps)
        if pair.read_condition is None:
            raise Unusable("condition missing", "it has no condition image and no instruction")
        condition = pair.read_condition()
        other = _open(condition.image, pair.name, size_px, filters)
        asked = [other.content, condition.instruction.encode()]
        number = _content([image.content, *asked, *of_reference], caption, filters)
        return Loaded(
            image.picture, caption, number, framing, reference, maps, condition, other.picture
        )
    except Unusable:
        raise
    except ImpromptError as error:
        raise Unusable("image damaged", str(error)) from error
    # A decoder may fail in any way on bytes that were made to break it; one pair stops nothing.
    except Exception as error:
        raise Unusable(
            "image damaged", f"reading failed: {type(error).__name__}: {error}"
        ) from error


def framing_of(size: tuple[int, int], size_px: int) -> tuple[int, ...]:
    """The six numbers that Stable Diffusion XL reads of a picture of (width, height), in its order.

    Height and width in the file, top and left of the square in the resized picture, its height and width.

    Source: Podell et al. (2307.01952), section 2.2; IP-Adapter's training script for XL gives the same.
    """
    _, (left, top) = center_crop(size, size_px)
    return (size[1], size[0], top, left, size_px, size_px)


@dataclass(frozen=True)
class _Opened:
    picture: object
    content: bytes
    """Tells it from others: the bytes of its file, or a scene's name."""
    size: tuple[int, int]
    """Width and height in the file."""


def _open(
    image: ImageSource,
    name: str,
    size_px: int,
    filters: Filters | None,
    missing: str = "image missing",
) -> _Opened:
    if isinstance(image, Scene):
        return _Opened(image, name.encode(), (size_px, size_px))
    is_file = isinstance(image, Path)
    content = read_file(image, MAX_IMAGE_BYTES, missing) if is_file else image()
    opened = open_image(BytesIO(content), name=shown(name))
    if filters is not None:
        filters.check_size(*opened.size)
    return _Opened(resize_and_center_crop(opened, size_px), content, opened.size)


def _read_map(file: Path, kind: str, image_size: tuple[int, int], size_px: int) -> Image.Image:
    found = open_image(
        BytesIO(read_file(file, MAX_IMAGE_BYTES, "map missing")), name=shown(file.name)
    )
    if abs(found.width * image_size[1] - found.height * image_size[0]) > sum(image_size) + sum(
        found.size
    ):
        raise Unusable(
            "map shape",
            f"the {kind} map {shown(file.name)} of {found.width} × {found.height} does not lie on "
            f"the image of {image_size[0]} × {image_size[1]}",
        )
    return resize_and_center_crop(found, size_px)


def _content(parts: Sequence[bytes], caption: str, filters: Filters) -> int:
    digest = hashlib.blake2b(b"\0".join(parts), digest_size=8)
    if filters.duplicates == "pair":
        digest.update(b"\0" + caption.encode())
    return int.from_bytes(digest.digest(), "little", signed=True)


def draw(pictures: Sequence[object], size_px: int) -> tuple[Tensor, Render | None]:
    """Pixels (batch, 3, size_px, size_px) in [-1, 1] of what `load` gave; scenes are drawn together.

    Beside them all that is known of the pictures, if every one is a scene.
    """
    import torch

    pixels = torch.empty(len(pictures), 3, size_px, size_px)
    scenes = [i for i, picture in enumerate(pictures) if isinstance(picture, Scene)]
    drawn = None
    if scenes:
        drawn = render([pictures[i] for i in scenes], size_px)  # type: ignore[misc]
        pixels[scenes] = drawn.pixels
    for i, picture in enumerate(pictures):
        if not isinstance(picture, Scene):
            pixels[i] = image_to_pixels(picture)  # type: ignore[arg-type]
    return pixels, drawn if len(scenes) == len(pictures) else None
