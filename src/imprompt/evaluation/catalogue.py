"""What can be measured, by the name that the command line knows. Nothing heavy is imported for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from imprompt.core.errors import ImpromptError


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Where a measurement stands, and what it needs."""

    function: str
    """The function of `evaluation.run` that takes a request; imported when it is needed."""
    reads: tuple[str, ...] = ()
    """What it looks at, of the command line's arguments that not all look at."""
    trains: bool = False
    """Whether it trains before it measures, beside a base in full precision."""
    needs_judge: bool = True
    """Whether the judge looks at what the base draws, which then must have the size that the judge reads."""

    def load(self) -> Callable[[Any], dict[str, float]]:
        """What takes an `evaluation.run.Request`, and gives figures by name."""
        return getattr(importlib.import_module("imprompt.evaluation.run"), self.function)


MEASUREMENTS = {
    "adapter": Measurement(function="of_adapter", reads=("adapter",)),
    "base": Measurement(function="of_base"),
    "judge": Measurement(function="of_judge", needs_judge=False),
    "ablation": Measurement(function="of_ablation", trains=True),
    "identity": Measurement(function="of_identity", reads=("adapter", "face_encoder")),
    "control": Measurement(function="of_controls", reads=("map_reader", "control_model")),
    "instruct": Measurement(function="of_instruct", reads=("adapter",)),
    "instruct-table": Measurement(function="of_instruct_table", trains=True),
    "instructions": Measurement(
        function="of_instructions", reads=("instructions",), needs_judge=False
    ),
    "pictures": Measurement(
        function="of_pictures", reads=("adapter", "data", "clip", "scales"), needs_judge=False
    ),
}


def measurement(what: str) -> Measurement:
    """The measurement of this name.

    Raises:
        ImpromptError: there is none; the message lists what there is.
    """
    if what not in MEASUREMENTS:
        raise ImpromptError(
            f"There is no measurement {what!r}; choose one of: {', '.join(MEASUREMENTS)}."
        )
    return MEASUREMENTS[what]
