"""Pairs in files, good and bad, for the tests of preparation."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imprompt.data.dataset import Columns
from imprompt.data.pairs import Pair
from imprompt.data.sources import open_source


def picture(number: int, side_px: int = 20, form: str = "PNG") -> bytes:
    """The file of a small picture that no other number has."""
    values = np.random.default_rng(number).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, form)
    return file.getvalue()


def decompression_bomb(side_px: int = 60_000) -> bytes:
    """A PNG of a few kilobytes that would fill the memory."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    )


def write_pair(folder: Path, name: str, image: bytes, caption: bytes | str | None) -> None:
    (folder / name).write_bytes(image)
    if caption is not None:
        caption = caption.encode() if isinstance(caption, str) else caption
        (folder / name).with_suffix(".txt").write_bytes(caption)


def add_member(archive: tarfile.TarFile, name: str, content: bytes, **attributes: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    archive.addfile(member, io.BytesIO(content))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def pairs_of(source: str) -> list[Pair]:
    """All pairs of a source, in order."""
    return [pair for part in open_source(source) for pair in part.pairs()]


def listed(data: Columns) -> list[dict[str, Any]]:
    """What prepared data list of the pair of each row: its name, caption and content."""
    parts = sorted(Path(data.path).glob("parts/*/pairs.jsonl"))
    lines = [line for part in parts for line in part.read_text().split("\n")[:-1]]
    removed = set(np.load(Path(data.path) / "removed.npy").tolist())
    return [json.loads(line) for number, line in enumerate(lines) if number not in removed]


def captions(data: Columns) -> list[str]:
    """The caption of each row of prepared data."""
    return [row["caption"] for row in listed(data)]
