"""Writing prepared data: columns and lists that grow at their end, locks.

A column is a .npy file whose header leaves room for its number of rows, so that rows are appended and
the number is put in when no more will come. Until then the file says it has none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from imprompt.core.errors import ImpromptError
from imprompt.core.files import disk_errors, write_json, write_whole

_HEADER_BYTES = 192


class GrowingColumn:
    """A column's file, opened to append rows after the first `num_rows` of those it has."""

    def __init__(self, path: Path, num_rows: int = 0) -> None:
        self.path = path
        self.num_rows = num_rows
        self._file: Any = None
        if num_rows:
            self.dtype, self.shape = read_header(path)[0], read_header(path)[1][1:]
            self._file = open(path, "r+b")  # noqa: SIM115
            whole = _HEADER_BYTES + num_rows * self.row_bytes
            if self._file.seek(0, os.SEEK_END) < whole:
                raise ImpromptError(f"{path} has lost rows. Prepare the data again.")
            self._file.truncate(whole)
            self._file.seek(whole)

    @property
    def row_bytes(self) -> int:
        return int(self.dtype.itemsize * np.prod(self.shape, dtype=np.int64))

    def append(self, values: Tensor) -> None:
        """Add rows (rows, …); the first decide shape and dtype.

        Raises:
            ImpromptError: the disk is full, or they are of another shape or dtype.
        """
        rows = np.ascontiguousarray(values.numpy())
        if self._file is None:
            self.dtype, self.shape = rows.dtype, rows.shape[1:]
            self._file = open(self.path, "w+b")  # noqa: SIM115
            self._write(_header(self.dtype, (0, *self.shape)))
        if rows.dtype != self.dtype or rows.shape[1:] != self.shape:
            raise ImpromptError(
                f"{self.path} has rows of {self.dtype} {self.shape}, and now come {rows.dtype} "
                f"{rows.shape[1:]}. Prepare into another folder."
            )
        self._write(rows.reshape(-1).view(np.uint8).data)
        self.num_rows += len(rows)

    def _write(self, content: bytes | memoryview) -> None:
        with disk_errors(self.path):
            self._file.write(content)

    def save(self) -> None:
        """Hand everything appended so far to the disk."""
        if self._file is not None:
            with disk_errors(self.path):
                self._file.flush()
                os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write the number of rows into the header; the column is whole."""
        if self._file is not None:
            with disk_errors(self.path):
                self._file.seek(0)
                self._file.write(_header(self.dtype, (self.num_rows, *self.shape)))
            self.save()

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk has been told of already
                self._file.close()
            self._file = None


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """A version 1.0 .npy header, of the same length for any number of rows."""
    text = repr({"descr": dtype.str, "fortran_order": False, "shape": shape})
    magic = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
    return magic + text.encode().ljust(_HEADER_BYTES - 11) + b"\n"


def read_header(file: Path | Any) -> tuple[np.dtype, tuple[int, ...], int]:
    """dtype, shape and length of the header of a .npy file (a path or an open file).

    Raises:
        ValueError: it is no .npy file, or one of objects or columns first.
    """
    if isinstance(file, Path):
        with open(file, "rb") as opened:
            return read_header(opened)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("the header is of another version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype.hasobject:
        raise ValueError("the values are laid out in another way")
    return dtype, shape, file.tell()


class GrowingLines:
    """A file of JSON lines that grows after its first `num_bytes`."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        with disk_errors(path):
            self._file: BinaryIO = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
            self._file.truncate(num_bytes)
            self._file.seek(num_bytes)
        self.num_bytes = num_bytes

    def read(self) -> list[dict[str, Any]]:
        return read_lines(self.path)

    def add(self, entry: Mapping[str, Any]) -> None:
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        with disk_errors(self.path):
            self._file.write(line)
        self.num_bytes += len(line)

    def save(self) -> None:
        with disk_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of JSON lines."""
    # Not splitlines: JSON may hold characters that Unicode calls line ends.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


class ColumnsWriter:
    """Writes a small folder of columns at once, without a source: `Columns.open` reads it.

    Rows are appended in order; `finish` makes the folder whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: dict[str, GrowingColumn] = {}

    def write(self, start: int, columns: Mapping[str, Tensor]) -> None:
        """Append rows start, start + 1, … of each column.

        Raises:
            ImpromptError: the disk has no room, or rows do not follow those before.
        """
        for name, values in columns.items():
            column = self._columns.setdefault(name, GrowingColumn(self.path / f"{name}.npy"))
            if column.num_rows != start:
                raise ImpromptError(f"Row {column.num_rows} of {name} comes next, not row {start}.")
            column.append(values)

    def finish(self, count: int, meta: Mapping[str, Any]) -> None:
        """Write the description that makes the folder whole, of its first `count` rows."""
        for column in self._columns.values():
            column.finish()
            column.close()
        write_json(
            self.path / "meta.json", {**meta, "count": count, "columns": sorted(self._columns)}
        )


def write_array(path: Path, values: np.ndarray) -> None:
    """Write a .npy file so that it is there whole or not at all."""
    write_whole(path, lambda file: np.save(file, values))


def part_name(number: int) -> str:
    """Where in a folder of prepared data its part of this number lies."""
    return f"parts/{number:05d}"


@contextmanager
def lock(folder: Path, *, wait: bool) -> Generator[bool, None, None]:
    """Hold a folder for this process; whether that succeeded, which it always does with `wait`.

    It ends with the process, however that ends. Where the system knows no locks, nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    with open(folder / "lock", "ab") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError:  # a network disk without locks: --shard keeps processes apart there
            pass
        yield held
