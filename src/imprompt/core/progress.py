"""What a command tells while it works, on standard error: lines, and progress with the time left."""

# Strict but for what numpy, Pillow and tqdm leave untyped:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


def say(message: str) -> None:
    """One line."""
    print(f"imprompt: {message}", file=sys.stderr, flush=True)


class ProgressBar:
    """A bar to report to."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def update(self, count: int) -> None:
        """`count` more units are done."""
        self._bar.update(count)

    def expect(self, count: int) -> None:
        """`count` more units (or fewer) are to be done than was thought."""
        self._bar.total += count

    def set(self, **figures: float | str) -> None:
        """Show figures beside the bar."""
        shown = {n: f"{v:.4g}" if isinstance(v, float) else v for n, v in figures.items()}
        self._bar.set_postfix(shown, refresh=False)


@contextmanager
def progress(
    total: int, description: str, unit: str = "it", *, silent: bool = False
) -> Generator[ProgressBar, None, None]:
    """A bar over `total` units for as long as the block runs; none if `silent`.

    On a terminal it redraws itself; in a log it writes a line now and then.
    """
    with tqdm(
        total=total,
        desc=description,
        unit=unit,
        mininterval=0.2,
        dynamic_ncols=True,
        disable=silent,
    ) as bar:
        yield ProgressBar(bar)
