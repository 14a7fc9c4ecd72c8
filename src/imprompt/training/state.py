"""Checkpoints of a run: written beside and renamed into place, so that one is whole or is not there.

    OUTPUT/checkpoints/step-00000500/
      state.safetensors    trainable weights, their moving average, the optimiser's moments
      counters.json        step, sums for the next line of the log, best value so far; written last

The frozen base is never part of it. Tensors are whole whatever engine writes them, so that a run may go on
with another engine, on other machines.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imprompt.core.errors import ImpromptError
from imprompt.core.files import is_disk_full, sync
from imprompt.training.optim import MovingAverage
from imprompt.training.parallel import Engine


@dataclass
class TrainingState:
    """All that changes while a run goes on."""

    names: Sequence[str]
    engine: Engine
    buffers: dict[str, Tensor]
    average: MovingAverage | None
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    """Of the figures since the last line in the log."""
    best: float | None = None
    """The best value so far of the figure that decides."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, whole. Every process must ask."""
        found = {f"buffer.{name}": buffer for name, buffer in self.buffers.items()}
        for index, (name, parameter) in enumerate(
            zip(self.names, self.engine.parameters, strict=True)
        ):
            found[f"weight.{name}"] = self.engine.whole(index, parameter.detach())
            if self.average is not None:
                found[f"average.{name}"] = self.engine.whole(index, self.average.averages[index])
            for moment, value in self.engine.moments(index).items():
                found[f"{moment}.{name}"] = value
        return found


def save_checkpoint(state: TrainingState, folder: Path, *, keep: int) -> Path:
    """Write the state of a run; older checkpoints beyond `keep` go once the new one is whole.

    Raises:
        ImpromptError: the disk is full or not writable; the previous checkpoint is untouched.
    """
    final = folder / f"step-{state.step:08d}"
    beside = folder / f"{final.name}.writing"
    processes = state.engine.processes
    tensors = _each_its_own(state.tensors())
    error = _write(state, tensors, beside, final) if processes.is_main else None
    if processes.any(error is not None):  # the others must hear of it, or they wait for ever
        raise error or ImpromptError(f"The checkpoint of step {state.step} could not be written.")
    if processes.is_main:
        for old in whole_checkpoints(folder)[:-keep]:
            (old / "counters.json").unlink(missing_ok=True)  # what is left of it is not whole
            shutil.rmtree(old, ignore_errors=True)
    return final


def _each_its_own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in memory of their own: an optimiser in 8 bits gives all parameters one table of values,
    and the file's format knows no sharing."""
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.contiguous()
        if own.data_ptr() in known:
            own = own.clone()
        known.add(own.data_ptr())
        found[name] = own
    return found


def _write(
    state: TrainingState, tensors: dict[str, Tensor], beside: Path, final: Path
) -> ImpromptError | None:
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file(tensors, beside / "state.safetensors")
        counters = {
            "step": state.step,
            "sums": state.sums,
            "best": state.best,
            **state.engine.counters(),
        }
        (beside / "counters.json").write_text(json.dumps(counters), encoding="utf-8")
        for name in ("state.safetensors", "counters.json"):
            sync(beside / name)
        if final.exists():
            shutil.rmtree(final)
        beside.rename(final)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        reason = "the disk is full" if is_disk_full(error) else str(error)
        failure = ImpromptError(
            f"The checkpoint of step {state.step} could not be written to {final.parent}: {reason}. "
            "The one before it is whole; make room and run the same command again."
        )
        failure.__cause__ = error
        return failure
    return None


def whole_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; half-written ones do not count."""
    if not folder.is_dir():
        return []
    return sorted(
        p for p in folder.glob("step-*") if p.suffix == "" and (p / "counters.json").is_file()
    )


def half_written(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.writing")) if folder.is_dir() else []


def load_checkpoint(state: TrainingState, path: Path) -> None:
    """Put a run back to where the checkpoint was written.

    Raises:
        ImpromptError: the checkpoint is damaged or belongs to other weights.
    """
    try:
        counters = json.loads((path / "counters.json").read_text(encoding="utf-8"))
        with safe_open(path / "state.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise ImpromptError(
            f"The checkpoint {path} is damaged ({error}); delete it to go on from the one before."
        ) from error
    wanted = set(state.tensors())
    moments = _moments(tensors, wanted)
    if not wanted <= set(tensors) or set(moments) != set(state.names):
        odd = sorted((wanted ^ set(tensors)) - {f"{m}.{n}" for n in moments for m in moments[n]})
        raise ImpromptError(
            f"The checkpoint {path} is of another model or optimiser: {', '.join(odd[:3])} do not match."
        )
    state.step = int(counters["step"])
    state.sums = dict(counters.get("sums", {}))
    state.best = counters.get("best")
    engine = state.engine
    engine.set_counters(counters)
    with torch.no_grad():
        for name, buffer in state.buffers.items():
            buffer.copy_(tensors[f"buffer.{name}"])
        for index, (name, parameter) in enumerate(zip(state.names, engine.parameters, strict=True)):
            parameter.copy_(engine.part(index, tensors[f"weight.{name}"]))
            if state.average is not None:
                state.average.averages[index].copy_(engine.part(index, tensors[f"average.{name}"]))
            engine.set_moments(index, moments[name], state.step)


def _moments(tensors: dict[str, Tensor], others: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """By parameter what the optimiser had: all tensors but `others`, named MOMENT.PARAMETER."""
    found: dict[str, dict[str, Tensor]] = {}
    for full_name in sorted(set(tensors) - set(others)):
        moment, _, name = full_name.partition(".")
        found.setdefault(name, {})[moment] = tensors[full_name]
    return found
