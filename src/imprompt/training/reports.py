"""What a run tells on its way: the live line, the log, the trackers, its looks at held-out rows."""

from __future__ import annotations

from pathlib import Path

from imprompt.core.progress import ProgressBar
from imprompt.training import log
from imprompt.training.config import PRECISIONS, TrainConfig
from imprompt.training.ledger import Ledger
from imprompt.training.output import say_once
from imprompt.training.speed import Speed
from imprompt.training.state import TrainingState
from imprompt.training.validation import Validation


class Reports:
    """Says after each step what is due. Every process asks it to; one writes."""

    def __init__(
        self,
        state: TrainingState,
        config: TrainConfig,
        output: Path,
        ledger: Ledger,
        validation: Validation,
    ) -> None:
        """Lines of the log past the state's step are forgotten, for the run writes them again.

        Raises:
            ImpromptError: an unknown tracker, or one that is not installed.
        """
        self._state, self._config = state, config
        self._ledger, self._validation = ledger, validation
        processes = self._processes = state.engine.processes
        self._log_file = output / "log.jsonl"
        if processes.is_main:
            log.drop_after(self._log_file, state.step)
        self._trackers = log.Trackers(config, output, state.step, processes)
        self._speed = Speed(processes.device, PRECISIONS[config.precision], processes.count)
        self._shown: dict[str, float] = {}

    def count_work(self, num_operations: int, num_samples: int) -> None:
        """How many floating-point operations so many samples took."""
        self._speed.flops_per_sample = num_operations / num_samples
        say_once(self._processes, f"{num_operations / num_samples / 1e9:,.3g} GFLOP per sample")

    def after_step(self, learning_rate: float, bar: ProgressBar) -> None:
        """Log and validate, if it is time; the state's step is already counted."""
        step, config = self._state.step, self._config
        logs = step % config.log_every_steps == 0
        is_time = step % config.validate_every_steps == 0 or step == config.steps
        validates = is_time and config.validation_rows > 0
        if logs or validates:
            self._ledger.settle()
        if logs:
            self._tell_means(learning_rate, bar)
        if validates:
            self._validate()

    def _tell_means(self, learning_rate: float, bar: ProgressBar) -> None:
        step, config = self._state.step, self._config
        figures = {**self._ledger.means(), "learning_rate": learning_rate}
        if self._processes.is_main:
            log.append(self._log_file, {"step": step, **figures})
        speeds = self._speed.look(config.log_every_steps * config.batch_size)
        self._trackers.log({**figures, **speeds}, step)
        self._shown["loss"] = figures["loss"]
        bar.set(**self._shown, **speeds)

    def _validate(self) -> None:
        step = self._state.step
        with self._speed.paused():
            figures = self._validation.run()
        named = {f"validation_{name}": value for name, value in figures.items()}
        if self._processes.is_main:
            log.append(self._log_file, {"step": step, **named})
        self._trackers.log(named, step)
        if self._validation.picture is not None:
            self._trackers.picture("preview", self._validation.picture, step)
        self._shown |= self._validation.headline(figures)

    def finish(self) -> None:
        """Close the trackers."""
        self._trackers.finish()
