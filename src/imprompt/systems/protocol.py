"""What the training loop asks of a system: the line between *what* is learned and *how* it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness

Figures = dict[str, "float | Tensor"]


@runtime_checkable  # for the type checks of the tests
class System(Protocol):
    """One published method as something to train.

    Attributes:
        columns: the cached columns that `loss` and `validate` read.
        module: all of its parameters that require gradients train, and nothing else does.

    Where the loss of a batch is not the mean over its rows, the system says `rows_are_coupled = True`: into
    how many parts a batch is cut then decides what is learned. Where it depends on the rows how often the
    frozen denoiser is asked, it says `calls_differ = True`.
    """

    columns: tuple[str, ...]
    module: nn.Module

    def loss(self, batch: dict[str, Tensor], randomness: Randomness) -> tuple[Tensor, Figures]:
        """The scalar to minimise, and further figures to log."""
        ...

    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        """Figures on held-out rows; the randomness is the same at every call of a run."""
        ...

    def export(self, path: Path) -> None:
        """Write what users load, to a path that the loop gives."""
        ...


@runtime_checkable
class ValidatedInParts(Protocol):
    """A system whose validation need not see all rows at once.

    Attributes:
        rows_at_once: how many rows are validated together; set by the loop, which knows how many fit. None is all.
    """

    rows_at_once: int | None


def starts_from_base(start: str) -> bool:
    """Whether the option `start` asks for the base's weights rather than new ones.

    Raises:
        ImpromptError: it says neither.
    """
    if start not in ("new", "base"):
        raise ImpromptError(
            f"start is {start!r}; use new (random weights) or base (go on with them)."
        )
    return start == "base"
