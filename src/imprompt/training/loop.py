"""The training loop: one function, the same for every system and every engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imprompt.core.errors import ImpromptError
from imprompt.core.files import disk_errors
from imprompt.core.progress import progress, say
from imprompt.core.randomness import Randomness
from imprompt.core.transfer import to_device
from imprompt.data.rows import Rows, part_ends
from imprompt.systems.protocol import Figures, System
from imprompt.training.batches import Batch, batches, num_trained_rows
from imprompt.training.config import TrainConfig
from imprompt.training.denoiser import attention_kernels, set_up_denoiser
from imprompt.training.engines import create_engine
from imprompt.training.ledger import Ledger
from imprompt.training.optim import MovingAverage, learning_rate_factor
from imprompt.training.output import claim_output, describe, say_once, stop_requests
from imprompt.training.parallel import Engine, trained_parameters
from imprompt.training.processes import Processes, join_processes
from imprompt.training.reports import Reports
from imprompt.training.speed import counted
from imprompt.training.state import (
    TrainingState,
    half_written,
    load_checkpoint,
    save_checkpoint,
    whole_checkpoints,
)
from imprompt.training.validation import Preview, Validation


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, has saved its state, and can be gone on with."""


def train(
    system: System,
    data: Rows,
    config: TrainConfig,
    output: Path,
    *,
    identity: dict[str, Any] | None = None,
    export_name: str = "export",
    processes: Processes | None = None,
    preview: Preview | None = None,
) -> Path:
    """Train a system on prepared data; called again with the same output, it goes on.

    Stopping and resuming gives, on a CPU, bit for bit what not stopping gives. Ctrl-C and SIGTERM save
    before they end the run. `identity` says what else (beside config and data) makes two runs the same.
    Of several processes each calls this, with what `join_processes` says. `preview` is drawn at every
    validation.

    Returns:
        What the system exported: `output / export_name`.

    Raises:
        ImpromptError: `output` holds another run, data do not fit, a loss or gradient is not finite.
        Interrupted: the run was asked to stop, after its state was saved.
    """
    data.require(system.columns)
    num_rows = num_trained_rows(data, config)
    processes = _found_processes(system) if processes is None else processes
    if processes.is_main:
        others = dict(identity or {})
        if getattr(system, "rows_are_coupled", False):
            others["num_parts"] = processes.count * config.gradient_accumulation_steps
        meta = dict(data.meta)
        if "id_embeds" not in system.columns:  # which may be added while others train on these data
            meta.pop("face_encoder", None)
        claim_output(output, describe(config, meta, others))
    set_up_denoiser(system, config)
    state = _begin(system, config, processes)
    checkpoints = output / "checkpoints"
    processes.wait_for_all()
    _go_on(state, checkpoints, config)
    ledger = Ledger(state, config, num_rows, part_ends(data))
    validation = Validation(system, state, data, num_rows, config, output, export_name, preview)
    validation.check_best_by()
    reports = Reports(state, config, output, ledger, validation)
    first_step = state.step
    steps = batches(
        data,
        system.columns,
        num_rows=num_rows,
        seed=config.seed,
        batch_size=config.batch_size,
        first_step=first_step,
        last_step=config.steps,
        process=processes.rank,
        num_processes=processes.count,
        num_parts=config.gradient_accumulation_steps,
        read_ahead=config.read_ahead,
    )
    with (
        # Around the gradient, too: what is computed again for it must be computed the same way.
        attention_kernels(system, processes.device),
        stop_requests() as stop,
        progress(config.steps, "training", unit="step", silent=not processes.is_main) as bar,
    ):
        bar.update(first_step)
        for parts in steps:
            learning_rate = config.learning_rate * learning_rate_factor(state.step, config)
            if state.step == first_step:
                results, norm = _first_update(state, parts, config, learning_rate, reports)
            else:
                results = _gradients(state.engine, parts, config)
                norm = state.engine.update(learning_rate)
            if state.average is not None:
                state.average.update(state.step)
            ledger.add(results, norm)
            state.step += 1
            bar.update(1)
            reports.after_step(learning_rate, bar)
            is_last, stopping = state.step == config.steps, processes.any(stop())
            if is_last or stopping or state.step % config.checkpoint_every_steps == 0:
                ledger.settle()
                save_checkpoint(state, checkpoints, keep=config.keep_checkpoints)
            if stopping and not is_last:
                reports.finish()
                raise Interrupted(
                    f"stopped and saved at step {state.step}; the same command goes on from there"
                )
    export = output / export_name
    with state.average or nullcontext(), state.engine.whole_weights():
        system.module.eval()
        if processes.is_main:
            with disk_errors(export):
                system.export(export)
    reports.finish()
    processes.wait_for_all()
    return export


def _gradients(
    engine: Engine, parts: Sequence[Batch], config: TrainConfig
) -> list[tuple[Tensor, Figures]]:
    """The loss of a batch, part by part, and its gradient."""
    device = engine.processes.device
    results: list[tuple[Tensor, Figures]] = []
    for part in parts:
        columns = {name: to_device(v, device) for name, v in part.columns.items()}
        randomness = Randomness(config.seed, part.samples, device)
        loss, figures = engine.loss(columns, randomness, is_last=part is parts[-1])
        engine.backward(loss / len(parts))
        results.append((loss.detach(), figures))
    return results


def _first_update(
    state: TrainingState,
    parts: Sequence[Batch],
    config: TrainConfig,
    learning_rate: float,
    reports: Reports,
) -> tuple[list[tuple[Tensor, Figures]], Tensor]:
    """A step like any other, whose work is counted and whose gradients are checked."""
    # What is compiled cannot be counted.
    with counted(not config.compile_blocks) as flops:
        results = _gradients(state.engine, parts, config)
    without = state.engine.without_gradient()
    if without:
        raise ImpromptError(
            f"{len(without)} of {len(state.names)} trainable parameters receive no gradient, "
            f"the first: {state.names[without[0]]}. Freeze them or use them in the loss."
        )
    norm = state.engine.update(learning_rate)
    state.engine.check_synchronised()
    if flops is not None:
        reports.count_work(flops.total, sum(len(part.samples) for part in parts))
    return results, norm


def _go_on(state: TrainingState, checkpoints: Path, config: TrainConfig) -> None:
    """Take up the last whole checkpoint, if there is one."""
    processes = state.engine.processes
    if whole := whole_checkpoints(checkpoints):
        load_checkpoint(state, whole[-1])
    if processes.is_main:
        for path in half_written(checkpoints):
            say(f"ignoring {path.name}: it was being written when the run was killed")
    steps = processes.gather(torch.tensor(state.step, device=processes.device)).tolist()
    if len(set(steps)) > 1:
        raise ImpromptError(
            f"The processes would go on from different steps ({', '.join(map(str, steps))}): they do not see "
            f"the same {checkpoints}. --output must be on a disk that all machines share."
        )
    if state.step > config.steps:
        raise ImpromptError(
            f"The run is at step {state.step} already; train.steps={config.steps} would lie behind it."
        )
    if state.step:
        say_once(processes, f"going on from step {state.step} of {config.steps}")


def _begin(system: System, config: TrainConfig, processes: Processes) -> TrainingState:
    named = trained_parameters(system.module)
    if not named:
        raise ImpromptError("This system has no parameter that trains.")
    system.module.train()
    count = sum(parameter.numel() for _, parameter in named)
    engine = create_engine(processes, system, config)
    where = f" in {processes.count} processes ({processes.engine})" if processes.count > 1 else ""
    say_once(
        processes,
        f"{count:,} parameters train{where} for {config.steps:,} steps of {config.batch_size} samples; "
        f"weights, moments and average take {count * 4 * (4 if config.ema_decay else 3) / 1e6:.0f} MB",
    )
    state_dict = system.module.state_dict()
    return TrainingState(
        names=[name for name, _ in named],
        engine=engine,
        buffers={n: b for n, b in system.module.named_buffers() if n in state_dict},
        average=MovingAverage(engine.parameters, config.ema_decay) if config.ema_decay else None,
    )


def _found_processes(system: System) -> Processes:
    """The processes that a launcher started; or this one alone, where the system is already."""
    found = join_processes()
    if found.engine != "single":
        return found
    return replace(found, device=next(system.module.parameters()).device)
