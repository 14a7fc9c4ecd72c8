"""Pairs in a .tar, as img2dataset and webdataset write them: members of one name, several suffixes.

Members are read where they lie in the archive and nothing is unpacked, so a member's name, link or
size can do no harm; those that only an attacker or a defect makes are listed as faults.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from imprompt.core.errors import ImpromptError
from imprompt.data.filters import Unusable
from imprompt.data.pairs import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    Pair,
    Part,
    check_size,
    decode_caption,
    decode_record,
    faulty,
    identity_of,
    shown,
)

TYPICAL_BYTES_PER_PAIR = 50_000
_BLOCK_BYTES = 512


def archive_part(path: Path, name: str, caption_key: str | None = None) -> Part:
    """The whole archive as one part; how many pairs it holds is estimated from its size."""
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise ImpromptError(f"Cannot read {path}: {error.strerror}.") from error
    return Part(
        shown(name),
        max(1, num_bytes // TYPICAL_BYTES_PER_PAIR),
        identity_of(name, num_bytes),
        lambda: archive_pairs(path, shown(name), caption_key),
    )


def archive_pairs(path: Path, name: str, caption_key: str | None = None) -> list[Pair]:
    """The pairs of an archive, in the order of their first members; what is wrong follows them."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    faults: list[Pair] = []

    def add(member: tarfile.TarInfo) -> None:
        label = f"{name}/{member.name}"
        inside = PurePosixPath(member.name)
        if inside.is_absolute() or ".." in inside.parts:
            faults.append(faulty(label, "archive name", "its name leads out of the archive"))
        elif member.issym() or member.islnk():
            faults.append(faulty(label, "archive link", "it is a link, not a file"))
        elif not member.isreg() or member.issparse():
            if not member.isdir():
                faults.append(faulty(label, "archive member", "it is no plain file"))
        else:
            # webdataset: what stands before the first dot names the sample, the rest is the field.
            stem, _, suffix = inside.name.partition(".")
            fields = samples.setdefault(str(inside.parent / stem), {})
            suffix = f".{suffix.lower()}"
            if suffix in fields:
                faults.append(faulty(label, "archive member", "its name is there twice"))
            else:
                fields[suffix] = (member.offset_data, member.size)

    damage = _visit(path, add)
    if damage:
        faults.append(faulty(name, "archive damaged", damage))
    pairs = [_Sample(path, key, fields, caption_key).pair(name) for key, fields in samples.items()]
    return [*pairs, *faults]


def _visit(path: Path, add: Callable[[tarfile.TarInfo], None]) -> str | None:
    """Call `add` for each member; what is wrong with the archive, if anything."""
    last = "its beginning"
    try:
        with tarfile.open(path, "r:") as archive, open(path, "rb") as file:
            num_bytes = file.seek(0, os.SEEK_END)
            while (member := archive.next()) is not None:
                # Else the list of a large archive fills the memory.
                archive.members = []  # type: ignore[attr-defined]
                if member.offset_data + member.size > num_bytes:
                    return f"it is cut off within {shown(member.name)}; what came before was read"
                add(member)
                last = shown(member.name)
            # The end is a block of zeros; at a header that is wrong, tarfile stops without a word.
            file.seek(archive.offset)
            if file.read(_BLOCK_BYTES).strip(b"\0"):
                return f"what follows {last} is no archive and was not read"
    # tarfile raises errors of many kinds on headers that were made to break it.
    except Exception as error:
        return f"it cannot be read after {last}: {error}"
    return None


@dataclass(frozen=True)
class _Sample:
    """The members of one name: where each suffix's bytes lie in the archive."""

    path: Path
    key: str
    fields: Mapping[str, tuple[int, int]]
    caption_key: str | None

    def pair(self, archive: str) -> Pair:
        name = shown(f"{archive}/{self.key}")
        if self.image_suffix is None:
            there = ", ".join(self.fields)
            return faulty(name, "image missing", f"there is no image beside {shown(there)}")
        name = f"{name}{self.image_suffix}"
        return Pair(name, self.read_caption, self.read_image, self.read_scores)

    @property
    def image_suffix(self) -> str | None:
        return next((suffix for suffix in IMAGE_SUFFIXES if suffix in self.fields), None)

    def read_image(self) -> bytes:
        return self._read(str(self.image_suffix), MAX_IMAGE_BYTES, "image missing")

    def read_caption(self) -> str:
        suffix = ".txt" if ".txt" in self.fields and self.caption_key is None else ".json"
        if suffix not in self.fields:
            raise Unusable("caption missing", f"no caption: {shown(self.key)}{suffix} is missing")
        content = self._read(suffix, MAX_CAPTION_BYTES, "caption missing")
        return decode_caption(content, self.key + suffix, self.caption_key)

    def read_scores(self) -> Mapping[str, Any]:
        if ".json" not in self.fields:
            return {}
        content = self._read(".json", MAX_CAPTION_BYTES, "score missing")
        return decode_record(content, self.key + ".json")

    def _read(self, suffix: str, max_bytes: int, kind: str) -> bytes:
        offset, size = self.fields[suffix]
        check_size(self.key + suffix, size, max_bytes, kind)
        with open(self.path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise Unusable(kind, f"the archive is cut off within {shown(self.key + suffix)}")
        return content
