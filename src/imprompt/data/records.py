"""Lists of pairs: JSON, JSON lines, CSV and TSV, whose entries name image files by their paths."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from imprompt.core.errors import ImpromptError
from imprompt.data.filters import Unusable
from imprompt.data.pairs import (
    MAX_IMAGE_BYTES,
    Condition,
    ImageSource,
    Pair,
    Part,
    caption_of,
    check_size,
    faulty,
    first_of,
    identity_of,
    shown,
)

CONDITION_KEYS = ("condition_image", "condition_file")
IMAGE_KEYS = ("image_file", "file_name", "image_path", "filepath", "file", "path", "image")
REFERENCE_KEY = "reference_file"  # another picture, such as one of the same person
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the user wants a source read.

    Paths in lists are relative to `image_root` (by default the list's folder) and may not leave it.
    The keys are looked for by their usual names unless they are given.
    """

    image_root: Path | None = None
    image_key: str | None = None
    caption_key: str | None = None
    maps: Mapping[str, Path] = field(default_factory=dict)
    """Folders of control maps by kind; a map has its image's name, whatever the suffix."""

    def described(self) -> dict[str, str | None]:
        """What is kept beside the data, for telling other data apart.

        Maps are no part of it: they become columns, which may be added later.
        """
        root = None if self.image_root is None else str(self.image_root)
        keys = {"image_key": self.image_key, "caption_key": self.caption_key}
        return {"image_root": root, **keys}


def is_list(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def list_parts(path: Path, reading: Reading, pairs_per_part: int) -> list[Part]:
    """The entries of a list, cut into parts. The list is held in memory, without its images.

    Raises:
        ImpromptError: it cannot be read, is empty, or names no images.
    """
    try:
        # Bytes that are no UTF-8 stand as half surrogates until the caption they are in is refused.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            records = list(_read(file, path.suffix.lower()))
    except (ValueError, RecursionError, OSError) as error:
        raise ImpromptError(f"{path} is no {path.suffix[1:].upper()} list: {error}") from error
    if not records:
        raise ImpromptError(f"{path} is empty; nothing can be prepared from it.")
    check_keys(str(path), _keys(records), reading)
    root = (reading.image_root or path.parent).resolve()
    parts = []
    for start in range(0, len(records), pairs_per_part):
        some = records[start : start + pairs_per_part]
        parts.append(
            Part(
                f"entries {start} to {start + len(some) - 1}",
                len(some),
                identity_of(*some),
                lambda start=start, some=some: [
                    record_pair(f"entry {start + i}", record, root, reading)
                    for i, record in enumerate(some)
                ],
            )
        )
    return parts


def _read(file: Any, suffix: str) -> Iterator[Any]:
    """The entries; one that cannot be read comes as a text that says why."""
    if suffix == ".json":
        records = json.load(file)
        if not isinstance(records, list):
            raise ValueError('it must be like [{"image_file": "a.jpg", "text": "a dog"}]')
        yield from records
    elif suffix == ".jsonl":
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield f"no JSON: {error}"
    else:
        csv.field_size_limit(min(sys.maxsize, 10_000_000))
        rows = csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",")
        header = next(rows, None) or []
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"no line of a table: {error}"
                continue
            if row:
                fitting = len(row) == len(header)
                yield (
                    dict(zip(header, row, strict=True))
                    if fitting
                    else f"it has {len(row)} fields where the first line has {len(header)}"
                )


def _keys(records: Sequence[Any]) -> set[str]:
    return {str(key) for record in records if isinstance(record, dict) for key in record}


def check_keys(name: str, keys: set[str], reading: Reading) -> None:
    """Raise an ImpromptError if no entry of a list can have an image."""
    lowered = {key.lower() for key in keys}
    there = ", ".join(sorted(keys)) or "nothing"
    if reading.image_key is not None and reading.image_key not in keys:
        raise ImpromptError(f"{name} has no column {reading.image_key!r}; it has {there}.")
    if reading.image_key is None and not lowered & set(IMAGE_KEYS):
        advice = (
            "addresses must be downloaded first, for example with img2dataset, whose output folder "
            "is a source"
            if "url" in lowered
            else f"name it with --image-key, or call it one of {', '.join(IMAGE_KEYS)}"
        )
        raise ImpromptError(f"{name} has no column of image files (it has {there}): {advice}.")


def record_pair(number: str, record: object, root: Path, reading: Reading) -> Pair:
    """The pair of one entry: {"image_file": …, "text": …} under these or other usual keys.

    For Instruct also {"condition_image": …, "instruction": …}, and if known "task" and "kept".
    """
    if not isinstance(record, Mapping):
        why = record if isinstance(record, str) else "it is no object"
        return faulty(number, "entry", f"{shown(str(why))[:200]}")
    path = record.get(reading.image_key) if reading.image_key else first_of(record, IMAGE_KEYS)
    if not isinstance(path, str) or not path or "\0" in path:
        return faulty(number, "entry", f"it names no image file: {shown(str(record))[:200]}")
    return _pair(shown(path), _File(root, path), record, root, reading)


def embedded_pair(
    name: str, content: bytes, record: Mapping[str, Any], root: Path, reading: Reading
) -> Pair:
    """The pair of an entry that has the bytes of its image in it; all else is as in other entries."""
    return _pair(shown(name), _Embedded(name, content), record, root, reading)


@dataclass(frozen=True)
class _Embedded:
    """A picture as the bytes of its file."""

    name: str
    content: bytes

    @property
    def source(self) -> ImageSource:
        return self._read

    def check(self) -> None:
        pass

    def _read(self) -> bytes:
        check_size(self.name, len(self.content), MAX_IMAGE_BYTES, "image missing")
        return self.content


@dataclass(frozen=True)
class _File:
    """A picture by the path that an entry gives."""

    root: Path
    path: str

    @property
    def source(self) -> ImageSource:
        is_address = self.path.startswith("file://")
        return self.root / (unquote(urlsplit(self.path).path) if is_address else self.path)

    def check(self) -> None:
        """Raise Unusable if the file lies outside of what a list may name."""
        file = self.source
        assert isinstance(file, Path)
        try:
            inside = file.resolve().is_relative_to(self.root)
        except (OSError, RuntimeError) as error:
            # Too long a name, or a link that leads in a circle.
            raise Unusable(
                "image missing", f"{shown(self.path)} cannot be found: {error}"
            ) from error
        if not inside:
            raise Unusable(
                "image outside", f"the image lies outside {self.root}; --image-root moves the limit"
            )


def _picture(name: str, value: Any, root: Path) -> _File | _Embedded | None:
    """What an entry says of another picture: a path, bytes, or both as `datasets` has them; or None."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return _Embedded(name, value)
    return _File(root, value) if isinstance(value, str) and value and "\0" not in value else None


def _pair(
    name: str,
    image: _File | _Embedded,
    record: Mapping[str, Any],
    root: Path,
    reading: Reading,
) -> Pair:
    given = first_of(record, (REFERENCE_KEY,))
    reference = _picture(f"the reference of {name}", given, root)

    def read_caption() -> str:
        for one in (image, reference):
            if one is not None:
                one.check()
        return caption_of(record, reading.caption_key)

    has_condition = first_of(record, (*CONDITION_KEYS, "instruction")) is not None
    return Pair(
        name,
        read_caption,
        image.source,
        lambda: record,
        None if reference is None else reference.source,
        read_condition=(lambda: _condition(name, record, root)) if has_condition else None,
    )


def _condition(name: str, record: Mapping[str, Any], root: Path) -> Condition:
    other = _picture(f"the condition of {name}", first_of(record, CONDITION_KEYS), root)
    texts = {key: record.get(key) or "" for key in ("instruction", "task", "kept")}
    if other is None:
        raise Unusable("condition missing", 'no condition image: "condition_image" is missing')
    if not all(isinstance(text, str) for text in texts.values()) or not texts["instruction"]:
        raise Unusable("condition missing", '"instruction" is missing, or no text')
    other.check()
    return Condition(other.source, **texts)
