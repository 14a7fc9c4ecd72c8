"""Prepared data: a folder of columns, each one memory-mapped array with a row per pair.

    OUT/
      meta.json          count, where the rows come from, the base that encoded them
      NAME.npy           one column, (rows, …)
      captions.jsonl     one JSON string per row

Rows are read by number in any order, so the sampler alone decides what a batch is; nothing is held in
memory but what was asked for.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imprompt.core.errors import ImpromptError


@dataclass(frozen=True)
class Columns:
    """Read access to prepared data. Make one with `Columns.open(folder)`."""

    path: Path
    meta: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def open(cls, path: str | Path) -> Columns:
        """Open a folder that `imprompt prepare` has finished.

        Raises:
            ImpromptError: there is no such folder, it is unfinished, or a column is damaged.
        """
        path = Path(path)
        description = path / "meta.json"
        if not description.is_file():
            hint = (
                "it is unfinished: run the same `imprompt prepare` again"
                if path.is_dir()
                else "no such folder"
            )
            raise ImpromptError(
                f"{path} is no prepared data ({hint}); `imprompt prepare SOURCE {path}` makes it."
            )
        try:
            meta = json.loads(description.read_text(encoding="utf-8"))
            arrays = {
                name: np.load(path / f"{name}.npy", mmap_mode="r") for name in meta["columns"]
            }
        except (OSError, ValueError, KeyError) as error:
            raise ImpromptError(
                f"The prepared data in {path} is damaged: {error}. Prepare it again."
            ) from error
        count = int(meta["count"])
        if short := [name for name, array in arrays.items() if len(array) < count]:
            raise ImpromptError(
                f"In {path}, the column {short[0]} has not {count} rows. Prepare it again."
            )
        # A column has room for every pair of the source; those that could not be used leave a tail.
        return cls(path, meta, {name: array[:count] for name, array in arrays.items()})

    def __len__(self) -> int:
        return int(self.meta["count"])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    def require(self, names: Sequence[str]) -> None:
        """Raise an ImpromptError unless all these columns are there."""
        missing = [name for name in names if name not in self.arrays]
        if missing:
            raise ImpromptError(
                f"{self.path} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}; "
                f"it has {', '.join(self.names)}. Prepare the data for this system."
            )

    def rows(self, indices: Sequence[int] | np.ndarray, names: Sequence[str]) -> dict[str, Tensor]:
        """The given rows of the given columns, in the given order."""
        indices = np.asarray(indices, dtype=np.int64)
        # Sorted reads touch the disk in one direction; the inverse restores the order asked for.
        order = np.argsort(indices, kind="stable")
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return {
            name: torch.from_numpy(self.arrays[name][indices[order]][inverse]) for name in names
        }

    def captions(self) -> list[str]:
        """All captions, in row order."""
        lines = (self.path / "captions.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


class ColumnsWriter:
    """Writes columns batch by batch into files with room for `capacity` rows.

    The shape of a column is learned from its first batch. What is there already is kept, so a killed
    writer goes on where it was; `meta.json` is written last, and a folder without it is unfinished.
    """

    def __init__(self, path: Path, capacity: int) -> None:
        self.path = path
        self.capacity = capacity
        self._arrays: dict[str, np.memmap] = {}

    def write(self, start: int, columns: Mapping[str, Tensor]) -> None:
        """Store rows start, start + 1, … of each column.

        Raises:
            ImpromptError: the disk has no room for a column, or cannot be written to.
        """
        for name, values in columns.items():
            if name not in self._arrays:
                self._arrays[name] = self._open(name, values)
            self._arrays[name][start : start + len(values)] = values.numpy()

    def _open(self, name: str, values: Tensor) -> np.memmap:
        file = self.path / f"{name}.npy"
        shape, dtype = (self.capacity, *values.shape[1:]), values.numpy().dtype
        needed, free = int(np.prod(shape)) * dtype.itemsize, shutil.disk_usage(self.path).free
        try:
            if file.exists():
                existing = np.lib.format.open_memmap(file, mode="r+")
                if existing.shape == shape and existing.dtype == dtype:
                    return existing
            if needed > free:
                raise OSError(errno.ENOSPC, f"only {free / 1e6:.0f} MB are free")
            return np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        except OSError as error:
            raise ImpromptError(
                f"Cannot write {file}, which needs {needed / 1e6:.0f} MB: {error.strerror}."
            ) from error

    def flush(self) -> None:
        """Hand everything written so far to the disk."""
        for array in self._arrays.values():
            array.flush()

    def finish(self, count: int, meta: Mapping[str, Any]) -> None:
        """Write the description that makes the folder whole, of its first `count` rows."""
        self.flush()
        write_json(
            self.path / "meta.json", {**meta, "count": count, "columns": sorted(self._arrays)}
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small file so that it is there whole or not at all."""
    beside = path.with_name(f"{path.name}.writing")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    beside.replace(path)
