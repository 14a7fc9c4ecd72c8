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
    Condition,
    Pair,
    Part,
    caption_of,
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
    entry = _Entry(root, path, record, reading.caption_key)
    reference = first_of(record, (REFERENCE_KEY,))
    other = None
    if isinstance(reference, str) and reference and "\0" not in reference:
        other = _Entry(root, reference, {}, None)

    def read_caption() -> str:
        if other is not None:
            other.check_inside()
        return entry.read_caption()

    file = None if other is None else other.file
    has_condition = first_of(record, (*CONDITION_KEYS, "instruction")) is not None
    return Pair(
        shown(path),
        read_caption,
        entry.file,
        entry.read_scores,
        file,
        read_condition=entry.read_condition if has_condition else None,
    )


@dataclass(frozen=True)
class _Entry:
    root: Path
    path: str
    record: Mapping[str, Any]
    caption_key: str | None

    @property
    def file(self) -> Path:
        is_address = self.path.startswith("file://")
        return self.root / (unquote(urlsplit(self.path).path) if is_address else self.path)

    def read_caption(self) -> str:
        self.check_inside()
        return caption_of(self.record, self.caption_key)

    def check_inside(self) -> None:
        """Raise Unusable if the file lies outside of what a list may name."""
        try:
            inside = self.file.resolve().is_relative_to(self.root)
        except (
            OSError,
            RuntimeError,
        ) as error:  # too long a name, or a link that leads in a circle
            raise Unusable(
                "image missing", f"{shown(self.path)} cannot be found: {error}"
            ) from error
        if not inside:
            raise Unusable(
                "image outside", f"the image lies outside {self.root}; --image-root moves the limit"
            )

    def read_condition(self) -> Condition:
        path = first_of(self.record, CONDITION_KEYS)
        texts = {name: self.record.get(name) or "" for name in ("instruction", "task", "kept")}
        if not isinstance(path, str) or not path or "\0" in path:
            raise Unusable("condition missing", 'no condition image: "condition_image" is missing')
        if not all(isinstance(text, str) for text in texts.values()) or not texts["instruction"]:
            raise Unusable("condition missing", '"instruction" is missing, or no text')
        other = _Entry(self.root, path, {}, None)
        other.check_inside()
        return Condition(other.file, **texts)

    def read_scores(self) -> Mapping[str, Any]:
        return self.record
