"""Pairs in a .tar, as img2dataset and webdataset write them: members of one name, several suffixes.

Members are read where they lie in the archive and nothing is unpacked, so a member's name, link or
size can do no harm; those that only an attacker or a defect makes are listed as faults.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Mapping
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
    pairs = [_pair(path, name, key, fields, caption_key) for key, fields in samples.items()]
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


def _pair(
    path: Path,
    archive: str,
    key: str,
    fields: Mapping[str, tuple[int, int]],
    caption_key: str | None,
) -> Pair:
    name = shown(f"{archive}/{key}")
    image = next((suffix for suffix in IMAGE_SUFFIXES if suffix in fields), None)
    if image is None:
        there = ", ".join(fields)
        return faulty(name, "image missing", f"there is no image beside {shown(there)}")
    text = ".txt" if ".txt" in fields and caption_key is None else ".json"

    def read(suffix: str, max_bytes: int, kind: str) -> bytes:
        offset, size = fields[suffix]
        check_size(key + suffix, size, max_bytes, kind)
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise Unusable(kind, f"the archive is cut off within {shown(key + suffix)}")
        return content

    def read_caption() -> str:
        if text not in fields:
            raise Unusable("caption missing", f"no caption: {shown(key)}{text} is missing")
        content = read(text, MAX_CAPTION_BYTES, "caption missing")
        return decode_caption(content, key + text, caption_key)

    def read_scores() -> Mapping[str, Any]:
        if ".json" not in fields:
            return {}
        return decode_record(read(".json", MAX_CAPTION_BYTES, "score missing"), key + ".json")

    return Pair(
        name + image,
        read_caption,
        lambda: read(image, MAX_IMAGE_BYTES, "image missing"),
        read_scores,
    )
