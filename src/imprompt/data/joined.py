"""Several prepared folders as one, as IP-Adapter was trained on LAION-2B and COYO-700M together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imprompt.core.errors import ImpromptError
from imprompt.data.dataset import Columns
from imprompt.data.rows import Fetched

_MUST_AGREE = ("encoders_fingerprint", "size_px", "face_encoder")


def _models(part: Columns) -> dict[str, Any]:
    """What encoded these data, and at which size, as far as it is told."""
    return {name: part.meta[name] for name in _MUST_AGREE if part.meta.get(name) is not None}


class JoinedColumns:
    """The rows of several prepared data one after another, drawn with equal chance.

    What is held out are the last rows, those of the last folder.
    """

    def __init__(self, parts: Sequence[Columns]) -> None:
        """
        Raises:
            ImpromptError: they were encoded by different models or at different sizes, or one that is
                given twice, to be drawn twice as often, is the last, so that what is held out would be
                trained on.
        """
        folders = [Path(part.path).resolve() for part in parts]
        if folders[-1] in folders[:-1]:
            raise ImpromptError(
                f"{parts[-1].path} is given more than once and stands last, where rows are held out "
                "that must not be trained on: put another folder last."
            )
        known: dict[str, Any] = {}
        for part in parts:
            for name, value in _models(part).items():
                if known.setdefault(name, value) != value:
                    raise ImpromptError(
                        f"{part.path} cannot be trained on together with those before it: "
                        f"its {name} is {value}, not {known[name]}."
                    )
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.path = " + ".join(str(part.path) for part in parts)
        self.meta: Mapping[str, Any] = {
            **known,
            "source": " + ".join(str(part.meta.get("source", part.path)) for part in parts),
            "count": len(self),
            "content_fingerprint": " + ".join(
                str(part.meta.get("content_fingerprint", "unknown")) for part in parts
            ),
        }

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that all of them have."""
        others = [set(part.names) for part in self._parts[1:]]
        return tuple(
            name for name in self._parts[0].names if all(name in other for other in others)
        )

    def require(self, names: Sequence[str]) -> None:
        """Raise an ImpromptError unless each of them has all these columns."""
        for part in self._parts:
            part.require(names)

    def rows(
        self, indices: Sequence[int] | range | np.ndarray, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """The given rows of the given columns, in the given order."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (-len(self) <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"{self.path} has rows 0 to {len(self) - 1}")
        indices = np.where(indices < 0, indices + len(self), indices)
        owners = np.searchsorted(self._ends, indices, side="right")
        order = np.argsort(owners, kind="stable")
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        begins = np.concatenate(([0], self._ends))
        pieces = [
            part.rows(indices[order][owners[order] == number] - begins[number], names)
            for number, part in enumerate(self._parts)
        ]
        return {name: torch.cat([piece[name] for piece in pieces])[back] for name in names}

    def fetch(self, indices: np.ndarray, names: Sequence[str]) -> Fetched:
        """The same, for reading ahead: nothing is left to do when the result is called."""
        values = self.rows(indices, names)
        return lambda: values
