"""What a training reads: rows of columns, wherever they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

Fetched = Callable[[], dict[str, Tensor]]
"""Rows that have been read, and become tensors when it is called."""

PARTS_AT_ONCE = 16
"""Where opening a part is expensive, rows are read from this many parts at a time."""


def part_ends(data: Rows) -> np.ndarray | None:
    """Where the parts of such data end, counted in rows; None where rows may be read in any order."""
    return getattr(data, "part_ends", None)


@runtime_checkable  # for the type checks of the tests
class Rows(Protocol):
    """Rows by number, in any order: prepared ones (`Columns`, several folders `JoinedColumns`) or ones
    encoded when asked for (`PairsOnTheFly`)."""

    @property
    def path(self) -> Path | str:
        """Where they come from, for messages."""
        ...

    @property
    def meta(self) -> Mapping[str, Any]:
        """What tells these data from others: source, base, fingerprints."""
        ...

    def __len__(self) -> int: ...

    def require(self, names: Sequence[str]) -> None:
        """Raise an ImpromptError unless all these columns can be had."""
        ...

    def rows(
        self, indices: Sequence[int] | range | np.ndarray, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """The given rows of the given columns, in the given order."""
        ...

    def fetch(self, indices: np.ndarray, names: Sequence[str]) -> Fetched:
        """Read these rows. In a thread of its own if wanted; the result is called in the main one."""
        ...


@dataclass(frozen=True)
class FirstRows:
    """The first `count` rows, for whoever must not see the others, which are held out."""

    whole: Rows
    count: int

    @property
    def path(self) -> Path | str:
        return self.whole.path

    @property
    def meta(self) -> Mapping[str, Any]:
        return self.whole.meta

    @property
    def names(self) -> Sequence[str]:
        """The columns' names, where they are known."""
        return getattr(self.whole, "names", ())

    def __len__(self) -> int:
        return self.count

    def require(self, names: Sequence[str]) -> None:
        self.whole.require(names)

    def rows(
        self, indices: Sequence[int] | range | np.ndarray, names: Sequence[str]
    ) -> dict[str, Tensor]:
        return self.whole.rows(indices, names)

    def fetch(self, indices: np.ndarray, names: Sequence[str]) -> Fetched:
        return self.whole.fetch(indices, names)
