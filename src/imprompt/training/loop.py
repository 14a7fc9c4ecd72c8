"""The training loop: one function, the same for every system."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imprompt.core.errors import ImpromptError
from imprompt.core.progress import progress
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns
from imprompt.systems.protocol import System
from imprompt.training import log
from imprompt.training.batches import batches
from imprompt.training.config import TrainConfig
from imprompt.training.optim import MovingAverage, create_optimizer, learning_rate_factor
from imprompt.training.state import (
    TrainingState,
    half_written,
    load_checkpoint,
    save_checkpoint,
    whole_checkpoints,
)

LOG_EVERY_STEPS = 20


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, has saved its state, and can be gone on with."""


def train(
    system: System,
    columns: Columns,
    config: TrainConfig,
    output: Path,
    *,
    identity: dict[str, Any] | None = None,
    export_name: str = "export",
) -> Path:
    """Train a system on prepared data; called again with the same output, it goes on.

    Stopping and resuming gives, on a CPU, bit for bit what not stopping gives. Ctrl-C and SIGTERM save
    before they end the run. `identity` says what else (beside config and data) makes two runs the same.

    Returns:
        What the system exported: `output / export_name`.

    Raises:
        ImpromptError: `output` holds another run, data do not fit, the loss is not finite.
        Interrupted: the run was asked to stop, after its state was saved.
    """
    columns.require(system.columns)
    num_rows = len(columns) - config.validation_rows
    if num_rows < 1:
        raise ImpromptError(
            f"{columns.path} has {len(columns)} rows and {config.validation_rows} are held out for "
            "validation: nothing is left to train on. Prepare more pairs or lower validation_rows."
        )
    claim_output(
        output,
        {"config": dataclasses.asdict(config), "data": dict(columns.meta), **(identity or {})},
    )
    state = _begin(system, config)
    checkpoints = output / "checkpoints"
    for path in half_written(checkpoints):
        _say(f"ignoring {path.name}: it was being written when the run was killed")
    if whole := whole_checkpoints(checkpoints):
        load_checkpoint(state, whole[-1])
        _say(f"going on from step {state.step} of {config.steps}")
    log_file = output / "log.jsonl"
    log.drop_after(log_file, state.step)

    device = state.parameters[0].device
    held_out: dict[str, Tensor] = {}
    if config.validation_rows:
        rows = columns.rows(range(num_rows, len(columns)), system.columns)
        held_out = {name: values.to(device) for name, values in rows.items()}
    half = config.precision == "bfloat16"
    sums: dict[str, float] = {}
    since, first_step = time.monotonic(), state.step
    steps = batches(
        columns,
        system.columns,
        num_rows=num_rows,
        seed=config.seed,
        batch_size=config.batch_size,
        first_step=state.step,
        last_step=config.steps,
    )
    with _stop_requests() as stop, progress(config.steps, "training", unit="step") as bar:
        bar.update(state.step)
        for samples, batch in steps:
            rate = config.learning_rate * learning_rate_factor(
                state.step,
                steps=config.steps,
                warmup_steps=config.warmup_steps,
                schedule=config.schedule,
            )
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            batch = {name: values.to(device) for name, values in batch.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss, figures = system.loss(batch, Randomness(config.seed, samples, device))
            if not torch.isfinite(loss):
                raise ImpromptError(
                    f"The loss is {loss.item()} at step {state.step} (samples {samples.start} to "
                    f"{samples.stop - 1}). The last checkpoint is whole; try a lower learning_rate."
                )
            loss.backward()
            if state.step == first_step:
                _assert_gradients(state)
            if config.max_gradient_norm:
                figures["gradient_norm"] = torch.nn.utils.clip_grad_norm_(
                    state.parameters, config.max_gradient_norm
                )
            state.optimizer.step()
            state.optimizer.zero_grad()
            if state.average is not None:
                state.average.update(state.step)
            state.step += 1
            bar.update(1)

            for name, value in {"loss": loss.detach(), **figures}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            if state.step % LOG_EVERY_STEPS == 0:
                means = {name: total / LOG_EVERY_STEPS for name, total in sums.items()}
                log.append(log_file, {"step": state.step, **means, "learning_rate": rate})
                done = (state.step - first_step) * config.batch_size
                bar.set(loss=means["loss"], samples_per_second=done / (time.monotonic() - since))
                sums = {}
            is_last = state.step == config.steps
            if held_out and (state.step % config.validate_every_steps == 0 or is_last):
                _validate(system, state, held_out, config, output, log_file)
            if state.step % config.checkpoint_every_steps == 0 or is_last or stop():
                save_checkpoint(state, checkpoints, keep=config.keep_checkpoints)
            if stop() and not is_last:
                raise Interrupted(
                    f"stopped and saved at step {state.step}; the same command goes on from there"
                )
    export = output / export_name
    with state.average or nullcontext():
        system.module.eval()
        system.export(export)
    return export


def claim_output(output: Path, identity: dict[str, Any]) -> None:
    """Make the folder this run's own, or check that it is.

    Raises:
        ImpromptError: the folder holds something else; the message says what differs.
    """
    description = output / "run.json"
    wanted = json.loads(json.dumps(identity, default=str))
    if description.exists():
        found = json.loads(description.read_text(encoding="utf-8"))
        differing = sorted(_differences(found, wanted))
        if differing:
            raise ImpromptError(
                f"{output} holds another run (different: {'; '.join(differing[:3])}). "
                "Choose another output folder, or repeat that run's settings to go on with it."
            )
        return
    if output.exists() and any(output.iterdir()):
        raise ImpromptError(
            f"{output} is not empty and holds no run. Choose another output folder."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        description.write_text(json.dumps(wanted, indent=2), encoding="utf-8")
    except OSError as error:
        raise ImpromptError(f"Cannot write to {output}: {error.strerror}.") from error


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in found.keys() | wanted.keys():
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
    elif found != wanted:
        yield f"{name} was {found!r}, now {wanted!r}"


def _begin(system: System, config: TrainConfig) -> TrainingState:
    trained = [(name, p) for name, p in system.module.named_parameters() if p.requires_grad]
    if not trained:
        raise ImpromptError("This system has no parameter that trains.")
    system.module.train()
    parameters = [parameter for _, parameter in trained]
    count = sum(parameter.numel() for parameter in parameters)
    _say(
        f"{count:,} parameters train for {config.steps:,} steps of {config.batch_size} samples; "
        f"weights, moments and average take {count * 4 * (4 if config.ema_decay else 3) / 1e6:.0f} MB"
    )
    return TrainingState(
        names=[name for name, _ in trained],
        parameters=parameters,
        buffers={n: b for n, b in system.module.named_buffers() if n in system.module.state_dict()},
        optimizer=create_optimizer(
            parameters,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            beta2=config.beta2,
        ),
        average=MovingAverage(parameters, config.ema_decay) if config.ema_decay else None,
    )


def _assert_gradients(state: TrainingState) -> None:
    without = [n for n, p in zip(state.names, state.parameters, strict=True) if p.grad is None]
    if without:
        raise ImpromptError(
            f"{len(without)} of {len(state.names)} trainable parameters receive no gradient, "
            f"the first: {without[0]}. Freeze them or use them in the loss."
        )


def _validate(
    system: System,
    state: TrainingState,
    held_out: dict[str, Tensor],
    config: TrainConfig,
    output: Path,
    log_file: Path,
) -> None:
    randomness = Randomness(
        config.seed + 1, range(config.validation_rows), state.parameters[0].device
    )
    with state.average or nullcontext():
        system.module.eval()
        figures = system.validate(held_out, randomness)
        picture = system.preview()
        system.module.train()
    log.append(
        log_file,
        {"step": state.step, **{f"validation_{name}": value for name, value in figures.items()}},
    )
    if picture is not None:
        (output / "previews").mkdir(exist_ok=True)
        picture.save(output / "previews" / f"step-{state.step:08d}.png")


@contextmanager
def _stop_requests() -> Iterator[Any]:
    """Within the block Ctrl-C and SIGTERM only set a flag, which the yielded function reads."""
    requested = False

    def request(number: int, frame: object) -> None:
        nonlocal requested
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested = True
        _say("stopping after this step (Ctrl-C again stops at once, without saving)")

    kept: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            kept[number] = signal.signal(number, request)
    except ValueError:
        pass  # not in the main thread: whoever runs us there handles signals
    try:
        yield lambda: requested
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _say(message: str) -> None:
    print(f"imprompt: {message}", file=sys.stderr, flush=True)
