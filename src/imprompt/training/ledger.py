"""The figures of each step: collected without holding up the device, and the guard against NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imprompt.core.errors import ImpromptError
from imprompt.systems.protocol import Figures
from imprompt.training.batches import equal_parts
from imprompt.training.config import TrainConfig
from imprompt.training.order import rows_of_samples
from imprompt.training.state import TrainingState

MAX_ROWS_TOLD = 64


@dataclass(frozen=True)
class _Waiting:
    """A step's figures on their way from the device."""

    step: int
    names: list[str]
    table: Tensor
    """(processes, values), on the CPU; not to be read before it has arrived."""
    sent: torch.cuda.Event | None

    @classmethod
    def begun(cls, step: int, names: list[str], found: Tensor) -> _Waiting:
        """Send for them, behind what the device has been given to do so far."""
        if found.device.type != "cuda":
            return cls(step, names, found.cpu(), None)
        table = found.to("cpu", non_blocking=True)  # which puts it into pinned memory
        sent = torch.cuda.Event()
        sent.record()
        return cls(step, names, table, sent)

    def arrived(self) -> Tensor:
        """The figures, once they are here. What the device was given later is not waited for."""
        if self.sent is not None:
            self.sent.synchronize()
        return self.table


class Ledger:
    """Sums figures between two lines of the log.

    A device computes behind the program's back; to ask for a number makes the program wait. So a step's
    figures are asked for only when the next step is under way.
    """

    def __init__(
        self, state: TrainingState, config: TrainConfig, num_rows: int, ends: np.ndarray | None
    ) -> None:
        """`num_rows` and the `ends` of parts: of the data, as `rows_of_samples` wants them."""
        self._state = state
        self._config = config
        self._num_rows, self._ends = num_rows, ends
        self._waiting: list[_Waiting] = []

    def add(self, results: Sequence[tuple[Tensor, Figures]], norm: Tensor) -> None:
        """The losses and figures of the parts of this process's batch, at the state's step."""
        device = norm.device
        names = list(results[0][1])
        figures = [
            torch.stack(
                [torch.as_tensor(figures[name], device=device).float() for _, figures in results]
            ).mean()
            for name in names
        ]
        values = torch.stack([*(loss.float() for loss, _ in results), *figures, norm.float()])
        if self._config.max_gradient_norm:
            names.append("gradient_norm")
        found = self._state.engine.processes.gather(values.detach())
        self.settle()
        self._waiting.append(_Waiting.begun(self._state.step, names, found))

    def settle(self) -> None:
        """Add up what is waiting.

        Raises:
            ImpromptError: a loss or the gradient is not finite; the message has the rows of its batch.
        """
        for waiting in self._waiting:
            num_parts = self._config.gradient_accumulation_steps
            table = waiting.arrived().double()
            self._check(waiting.step, table[:, :num_parts], table[:, -1])
            means = table.mean(0).tolist()
            loss = sum(means[:num_parts]) / num_parts
            figures = zip(waiting.names, means[num_parts:], strict=False)
            for name, value in {"loss": loss, **dict(figures)}.items():
                self._state.sums[name] = self._state.sums.get(name, 0.0) + value
        self._waiting.clear()

    def means(self) -> dict[str, float]:
        """Of all steps since this was last asked for."""
        means = {n: total / self._config.log_every_steps for n, total in self._state.sums.items()}
        self._state.sums.clear()
        return means

    def _check(self, step: int, losses: Tensor, norms: Tensor) -> None:
        """`losses` (processes, parts) and gradient norms (processes,) of one step."""
        size = self._config.batch_size
        batch = range(step * size, (step + 1) * size)
        if not bool(losses.isfinite().all()):
            parts = [
                part
                for share in equal_parts(batch, len(losses))
                for part in equal_parts(share, losses.shape[1])
            ]
            finite = losses.isfinite().flatten().tolist()
            bad = [part for part, is_finite in zip(parts, finite, strict=True) if not is_finite]
            self._refuse(f"The loss is {losses.mean().item()}", step, bad)
        # A scaled loss may overflow; its step is then passed over, and the scale lowered.
        if self._config.precision != "float16" and not bool(norms.isfinite().all()):
            self._refuse(
                f"The loss is finite but its gradient's norm {norms[0].item()}", step, [batch]
            )

    def _refuse(self, what: str, step: int, parts: Sequence[range]) -> None:
        told = []
        for part in parts:
            rows = rows_of_samples(part, self._num_rows, self._config.seed, self._ends).tolist()
            more = f" and {len(rows) - MAX_ROWS_TOLD} more" if len(rows) > MAX_ROWS_TOLD else ""
            shown = ", ".join(map(str, rows[:MAX_ROWS_TOLD]))
            told.append(f"samples {part.start} to {part.stop - 1}, rows {shown}{more}")
        raise ImpromptError(
            f"{what} at step {step} ({'; '.join(told)}). Nothing of it was "
            "saved, and the last checkpoint is whole; look at these rows, or try a lower learning_rate."
        )
