"""Writing files so that they are there whole or not at all, and saying why one could not be written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from imprompt.core.errors import ImpromptError


@contextmanager
def replacing(path: Path, beside: Path) -> Generator[None, None, None]:
    """Put the file `beside`, which the block writes, in the place of `path`: whoever reads finds the old
    one or the whole new one. If the block fails, neither is changed nor left behind."""
    try:
        yield
        sync(beside)
        os.replace(beside, path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until all of a file is on the disk: a rename may get there before what it renames."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file by `write`, so that it is there whole or not at all.

    Raises:
        ImpromptError: the disk is full, or does not let it be written.
    """
    beside = path.with_name(f"{path.name}.writing")
    with disk_errors(path), replacing(path, beside), open(beside, "wb") as file:
        write(file)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small file so that it is there whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


@contextmanager
def disk_errors(path: Path) -> Generator[None, None, None]:
    """Turn an error of the disk within the block into one a user can act on."""
    try:
        yield
    except OSError as error:
        advice = " Make room and give the same command again." if is_disk_full(error) else ""
        raise ImpromptError(f"Cannot write {path}: {error.strerror or error}.{advice}") from error


def is_disk_full(error: Exception) -> bool:
    """Whether this is why something was not written; of some libraries only the words tell it."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise an ImpromptError unless the disk has room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise ImpromptError(
            f"Cannot write to {folder}: what comes next needs {needed_bytes / 1e6:.0f} MB and "
            f"{free / 1e6:.0f} MB are free. Make room and give the same command again."
        )
