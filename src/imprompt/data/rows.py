"""What a training reads: rows of columns, wherever they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

Fetched = Callable[[], dict[str, Tensor]]
"""Rows that have been read, and become tensors when it is called."""


@runtime_checkable  # for the type checks of the tests
class Rows(Protocol):
    """Rows by number, in any order: prepared ones (`Columns`) or ones encoded when asked for
    (`PairsOnTheFly`)."""

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
