"""Prepared data: a folder of columns, each one memory-mapped array with a row per pair.

    OUT/
      meta.json          count, where the rows come from, the base that encoded them
      NAME.npy           one column, (rows, …)
      captions.jsonl     one JSON string per row

Rows are read by number in any order, so the sampler alone decides what a batch is; nothing is held in
memory but what was asked for.
"""

from __future__ import annotations

import json
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
            hint = "it is unfinished: run the same `imprompt prepare` again" if path.is_dir() else "no such folder"
            raise ImpromptError(f"{path} is no prepared data ({hint}); `imprompt prepare SOURCE {path}` makes it.")
        try:
            meta = json.loads(description.read_text(encoding="utf-8"))
            arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in meta["columns"]}
        except (OSError, ValueError, KeyError) as error:
            raise ImpromptError(f"The prepared data in {path} is damaged: {error}. Prepare it again.") from error
        short = [name for name, array in arrays.items() if len(array) != meta["count"]]
        if short:
            raise ImpromptError(f"In {path}, the column {short[0]!r} has not {meta['count']} rows. Prepare it again.")
        return cls(path, meta, arrays)

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
        return {name: torch.from_numpy(self.arrays[name][indices[order]][inverse]) for name in names}

    def captions(self) -> list[str]:
        """All captions, in row order."""
        lines = (self.path / "captions.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


class ColumnsWriter:
    """Writes the columns of a known number of rows, batch by batch; a killed writer goes on where it was.

    The shape of a column is learned from its first batch. `meta.json` is written last, so a folder
    without it is unfinished.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.count = count
        path.mkdir(parents=True, exist_ok=True)
        self._arrays: dict[str, np.memmap] = {}

    def write(self, start: int, columns: Mapping[str, Tensor]) -> None:
        """Store rows start, start + 1, … of each column."""
        for name, values in columns.items():
            array = self._arrays.get(name)
            if array is None:
                array = self._arrays[name] = self._open(name, values)
            array[start : start + len(values)] = values.numpy()

    def _open(self, name: str, values: Tensor) -> np.memmap:
        file = self.path / f"{name}.npy"
        shape, dtype = (self.count, *values.shape[1:]), values.numpy().dtype
        try:
            if file.exists():
                existing = np.lib.format.open_memmap(file, mode="r+")
                if existing.shape == shape and existing.dtype == dtype:
                    return existing
            return np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        except OSError as error:
            needed = int(np.prod(shape)) * dtype.itemsize
            raise ImpromptError(f"Cannot write {file} ({needed / 1e6:.0f} MB): {error.strerror}.") from error

    def flush(self) -> None:
        """Hand everything written so far to the disk."""
        for array in self._arrays.values():
            array.flush()

    def finish(self, captions: Sequence[str], meta: Mapping[str, Any]) -> None:
        """Write captions and, at the very end, the description that makes the folder whole."""
        self.flush()
        lines = "".join(json.dumps(caption, ensure_ascii=False) + "\n" for caption in captions)
        (self.path / "captions.jsonl").write_text(lines, encoding="utf-8")
        description = {**meta, "count": self.count, "columns": sorted(self._arrays)}
        beside = self.path / "meta.json.writing"
        beside.write_text(json.dumps(description, indent=2, ensure_ascii=False), encoding="utf-8")
        beside.replace(self.path / "meta.json")
