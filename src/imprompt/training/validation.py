"""Looking at held-out rows: figures, a picture, and the best weights so far."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imprompt.core.errors import ImpromptError, first_line
from imprompt.core.files import disk_errors, write_json
from imprompt.core.progress import say
from imprompt.core.randomness import Randomness
from imprompt.data.rows import Rows
from imprompt.systems.protocol import System, ValidatedInParts
from imprompt.training.config import PRECISIONS, TrainConfig
from imprompt.training.state import TrainingState

Preview = Callable[[], Image.Image]
"""Draws, with fixed seeds, what has been learned so far."""


class Validation:
    """Looks at the same rows with the same randomness every time; every process does, one writes."""

    def __init__(
        self,
        system: System,
        state: TrainingState,
        data: Rows,
        num_rows: int,
        config: TrainConfig,
        output: Path,
        export_name: str,
        preview: Preview | None = None,
    ) -> None:
        self._system, self._state, self._config = system, state, config
        self._output, self._export_name = output, export_name
        self._device = state.engine.processes.device
        self._preview = preview
        self._rows = range(num_rows, len(data))
        self._data = data
        if isinstance(system, ValidatedInParts):
            # What is trained on at once fits the device; all rows that are held out need not.
            num_parts = state.engine.processes.count * config.gradient_accumulation_steps
            system.rows_at_once = config.batch_size // num_parts
        self._held_out: dict[str, Tensor] | None = None
        self.picture: Image.Image | None = None
        """What was drawn last, if anything is."""

    def run(self) -> dict[str, float]:
        """Validate the weights (their moving average, if there is one), draw, keep the best."""
        system, state = self._system, self._state
        with state.average or nullcontext(), state.engine.whole_weights():
            system.module.eval()
            with self._precision():
                figures = self._figures()
                picture = self._drawn()
            if state.engine.processes.is_main and picture is not None:
                folder = self._output / "previews"
                with disk_errors(folder):
                    folder.mkdir(exist_ok=True)
                    picture.save(folder / f"step-{state.step:08d}.png")
            self.picture = picture
            self._keep_best(figures)
            system.module.train()
        return figures

    def check_best_by(self) -> None:
        """See at the start of a run, not after its first thousand steps, that there is such a figure.

        Raises:
            ImpromptError: `best_by` names a figure that validation does not give.
        """
        if not self._config.best_by or not len(self._rows) or self._state.step:
            return
        with self._state.engine.whole_weights():
            self._system.module.eval()
            with self._precision():
                figures = self._figures()
            self._system.module.train()
        self._deciding(figures)

    def _figures(self) -> dict[str, float]:
        if self._held_out is None:
            held_out = self._data.rows(self._rows, self._system.columns)
            self._held_out = {name: values.to(self._device) for name, values in held_out.items()}
        randomness = Randomness(
            self._config.seed + 1, range(self._config.validation_rows), self._device
        )
        return self._system.validate(self._held_out, randomness)

    def _precision(self) -> torch.autocast:
        """A base kept in half precision needs its inputs cast, as in training."""
        half = self._config.frozen_precision != "float32"
        dtype = PRECISIONS[self._config.frozen_precision] if half else torch.bfloat16
        return torch.autocast(self._device.type, dtype, enabled=half)

    def _drawn(self) -> Image.Image | None:
        """The preview; where drawing it fails this is told, and the run goes on without."""
        if self._preview is None:
            return None
        processes = self._state.engine.processes
        try:
            return self._preview()
        except Exception as error:
            if processes.engine == "fsdp2":  # blocks are gathered by all: one must not go on alone
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            say(f"no preview at step {self._state.step}: {reason}")
            return None

    def headline(self, figures: dict[str, float]) -> dict[str, float]:
        """What of the figures the live line has room for: the loss with the image and without."""
        wanted = [n for n in figures if n in ("loss_with_image", "loss_without_image")]
        return {n.removeprefix("loss_"): figures[n] for n in wanted or list(figures)[:1]}

    def _keep_best(self, figures: dict[str, float]) -> None:
        """Export to best/ if the deciding figure was never better."""
        chosen = self._deciding(figures)
        if chosen is None:
            return
        name, sign = chosen
        if not math.isfinite(figures[name]):
            return
        if self._state.best is not None and sign * figures[name] >= sign * self._state.best:
            return
        self._state.best = figures[name]
        if self._state.engine.processes.is_main:
            best, beside = self._output / "best", self._output / "best.writing"
            with disk_errors(best):
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir()
                self._system.export(beside / self._export_name)
                write_json(
                    beside / "best.json",
                    {"step": self._state.step, "by": name, "value": figures[name]},
                )
                shutil.rmtree(best, ignore_errors=True)
                beside.rename(best)

    def _deciding(self, figures: dict[str, Any]) -> tuple[str, int] | None:
        """The figure's name, and 1 if low values are good, or else -1."""
        if self._config.best_by:
            direction, _, name = self._config.best_by.partition(":")
            if name not in figures:
                raise ImpromptError(
                    f"best_by names the figure {name!r}; validation gives {', '.join(figures)}."
                )
            return name, 1 if direction == "lowest" else -1
        found = [name for name in figures if name.startswith(("loss", "error"))]
        return (found[0], 1) if found else None
