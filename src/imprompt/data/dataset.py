"""Prepared data: a folder of columns, read by row number in any order.

    OUT/
      meta.json            count, where the rows come from, the base that encoded them
      parts.npy            how many rows each part has
      removed.npy          rows (counted over the parts) that repeat an earlier one and do not count
      quarantine.jsonl     what could not be used, and why
      parts/00000/
        NAME.npy           one column, (rows, …), a plain numpy file
        pairs.jsonl        name, caption and content of each row

The sampler alone decides what a batch is. Rows are read where they lie and nothing else is: memory does
not grow with the data, neither this process's nor, as it would with memory-mapped files, what the system
counts as this process's. A folder may lie on an object store, under a URL that fsspec knows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imprompt.core.errors import ImpromptError
from imprompt.data.rows import Fetched
from imprompt.data.store import ColumnsWriter, part_name, read_header

__all__ = ["Columns", "ColumnsWriter"]

# Between tries to read what could not be read: a disk on a network may be away for a while.
SECONDS_BEFORE_TRIES = (1.0, 5.0, 25.0)


class _CutOff(OSError):
    """A file that is shorter than it must be, and will be so at the next try."""


@dataclass(frozen=True)
class _Column:
    dtype: np.dtype
    shape: tuple[int, ...]
    header_bytes: int

    @property
    def row_bytes(self) -> int:
        return int(self.dtype.itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Columns:
    """Read access to prepared data. Make one with `Columns.open(folder)`."""

    path: Path | str
    meta: Mapping[str, Any]
    _columns: Mapping[str, _Column]
    _folders: tuple[str, ...]
    _ends: np.ndarray
    """(parts,): how many rows there are up to the end of each part."""
    _removed: np.ndarray
    _files: _LocalFiles | _RemoteFiles = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Columns:
        """Open a folder, or a URL such as s3://bucket/data, that `imprompt prepare` has finished.

        Raises:
            ImpromptError: there is no such folder, it is unfinished, or a column is damaged.
        """
        remote = "://" in str(path)
        path = str(path).rstrip("/") if remote else Path(path)
        files = _RemoteFiles(str(path)) if remote else _LocalFiles(Path(path))
        try:
            meta = json.loads(files.read("meta.json"))
        except (FileNotFoundError, NotADirectoryError) as error:
            hint = (
                "it is unfinished: run the same `imprompt prepare` again"
                if not remote and Path(path).is_dir()
                else "no such folder"
            )
            raise ImpromptError(
                f"{path} is no prepared data ({hint}); `imprompt prepare SOURCE {path}` makes it."
            ) from error
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
        try:
            names, count = tuple(meta.pop("columns")), int(meta["count"])
            if "num_parts" in meta:
                counts = np.load(BytesIO(files.read("parts.npy")))
                removed = np.load(BytesIO(files.read("removed.npy")))
                folders = tuple(f"{part_name(number)}/" for number in range(len(counts)))
            else:
                counts, removed, folders = np.array([count]), np.empty(0, np.int64), ("",)
            if counts.sum() - len(removed) != count:
                raise ValueError(f"it has not {count} rows")
            first = folders[int(np.argmax(counts > 0))]
            columns = {}
            for name in names:
                dtype, shape, header_bytes = read_header(BytesIO(files.head(f"{first}{name}.npy")))
                columns[name] = _Column(dtype, shape[1:], header_bytes)
                files.check(name, columns[name], folders, counts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error
        return cls(path, meta, columns, folders, np.cumsum(counts), removed, files)

    def __reduce__(self):
        return Columns.open, (self.path,)

    def __len__(self) -> int:
        return int(self.meta["count"])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._columns)

    def require(self, names: Sequence[str]) -> None:
        """Raise an ImpromptError unless all these columns are there."""
        missing = [name for name in names if name not in self._columns]
        if missing:
            raise ImpromptError(
                f"{self.path} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}; "
                f"it has {', '.join(self.names)}. Prepare the data for this system: `imprompt prepare` "
                f"with --columns {' '.join(missing)} adds to what is there."
            )

    def rows(
        self, indices: Sequence[int] | range | np.ndarray, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """The given rows of the given columns, in the given order."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (-len(self) <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"{self.path} has rows 0 to {len(self) - 1}")
        stored = self._stored(np.where(indices < 0, indices + len(self), indices))
        # Sorted reads touch the disk in one direction; each lands where it was asked for.
        order = np.argsort(stored, kind="stable")
        runs = list(self._runs(stored[order], order))
        values = {}
        for name in names:
            column = self._columns[name]
            out = np.empty((len(indices), *column.shape), column.dtype)
            view = out.reshape(-1).view(np.uint8).data
            size = column.row_bytes
            wanted = [
                (
                    f"{self._folders[part]}{name}.npy",
                    column.header_bytes + row * size,
                    view[place * size : (place + count) * size],
                )
                for part, row, place, count in runs
            ]
            self._fill(wanted)
            values[name] = torch.from_numpy(out)
        return values

    def _fill(self, wanted: Wanted) -> None:
        """Read, and where something stands in the way, try again before giving up."""
        for pause in (*SECONDS_BEFORE_TRIES, None):
            try:
                return self._files.fill(wanted)
            except (_CutOff, FileNotFoundError) as error:
                raise _damaged(self.path, error) from error
            except Exception as error:  # of the disk, or of whatever library reads a store
                if pause is None:
                    raise ImpromptError(
                        f"The prepared data in {self.path} could not be read ({error}), and several tries did "
                        "not help. Once they can be, the same command goes on from the last checkpoint."
                    ) from error
                time.sleep(pause)
        return None

    def fetch(self, indices: np.ndarray, names: Sequence[str]) -> Fetched:
        """The same, for reading ahead: nothing is left to do when the result is called."""
        values = self.rows(indices, names)
        return lambda: values

    def _stored(self, indices: np.ndarray) -> np.ndarray:
        """Row numbers counted over the parts, where removed rows still have theirs."""
        if len(self._removed) == 0:
            return indices
        before = self._removed - np.arange(len(self._removed))
        return indices + np.searchsorted(before, indices, side="right")

    def _runs(self, stored: np.ndarray, order: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
        """(part, row in it, place in the answer, count) of rows that lie and land side by side."""
        if len(stored) == 0:
            return
        parts = np.searchsorted(self._ends, stored, side="right")
        begins = np.concatenate(([0], self._ends))[parts]
        joined = (np.diff(stored) == 1) & (np.diff(order) == 1) & (np.diff(parts) == 0)
        starts = np.concatenate(([0], np.flatnonzero(~joined) + 1))
        counts = np.diff(np.append(starts, len(stored)))
        yield from zip(
            parts[starts].tolist(),
            (stored - begins)[starts].tolist(),
            order[starts].tolist(),
            counts.tolist(),
            strict=True,
        )


def _damaged(path: Path | str, error: Exception) -> ImpromptError:
    return ImpromptError(f"The prepared data in {path} is damaged: {error}. Prepare it again.")


Wanted = list[tuple[str, int, memoryview]]
"""Stretches to read: file, place of the first byte, and where to put them."""


class _OpenFile:
    """A file to read by position, closed when nobody has it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):  # else the system reads ahead what nobody asked for
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _max_open_files() -> int:
    """Half of what a process may have open: to open a file anew for every read costs more than the read."""
    try:
        import resource

        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except ImportError:
        return 256
    return max(64, min(16_384, allowed // 2)) if allowed > 0 else 16_384


class _LocalFiles:
    """Files of a folder; the most recent stay open. Threads read at the same time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # One that is dropped from here while a thread reads it stays open until that is done.
        self._opened = lru_cache(_max_open_files())(lambda name: _OpenFile(folder / name))

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def head(self, name: str) -> bytes:
        with open(self.folder / name, "rb") as file:
            return file.read(1024)

    def check(self, name: str, column: _Column, folders: Sequence[str], counts: np.ndarray) -> None:
        for folder, count in zip(folders, counts.tolist(), strict=True):
            wanted = column.header_bytes + count * column.row_bytes
            if count and os.stat(self.folder / f"{folder}{name}.npy").st_size < wanted:
                raise ValueError(f"{folder}{name}.npy has not {count} rows")

    def fill(self, wanted: Wanted) -> None:
        for name, offset, view in wanted:
            file = self._opened(name)
            while len(view):
                done = os.preadv(file.descriptor, [view], offset)
                if done == 0:
                    raise _CutOff(f"{name} is cut off")
                view, offset = view[done:], offset + done


class _RemoteFiles:
    """Files under a URL, read by fsspec, many ranges at a time."""

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs

            self._system, self._root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ImpromptError(f"{url} cannot be opened: {error}.") from error

    def read(self, name: str) -> bytes:
        return self._system.cat_file(f"{self._root}/{name}")

    def head(self, name: str) -> bytes:
        return self._system.cat_file(f"{self._root}/{name}", start=0, end=1024)

    def check(self, name: str, column: _Column, folders: Sequence[str], counts: np.ndarray) -> None:
        """Asking a store for the size of each of thousands of files would take too long."""

    def fill(self, wanted: Wanted) -> None:
        parts = self._system.cat_ranges(
            [f"{self._root}/{name}" for name, _, _ in wanted],
            [offset for _, offset, _ in wanted],
            [offset + len(view) for _, offset, view in wanted],
            on_error="raise",
        )
        for (name, _, view), content in zip(wanted, parts, strict=True):
            if len(content) != len(view):
                raise _CutOff(f"{name} is cut off")
            view[:] = content
