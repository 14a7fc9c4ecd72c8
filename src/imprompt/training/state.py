"""Checkpoints of a run: written beside and renamed into place, so that one is whole or is not there.

    OUTPUT/checkpoints/step-00000500/
      state.safetensors    trainable weights, their moving average, the optimiser's moments
      counters.json        step and samples seen; written last, so its presence means "whole"

The frozen base is never part of it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from imprompt.core.errors import ImpromptError
from imprompt.training.optim import MovingAverage

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainingState:
    """All that changes while a run goes on."""

    names: Sequence[str]
    parameters: Sequence[nn.Parameter]
    buffers: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    average: MovingAverage | None
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        found = {f"buffer.{name}": buffer for name, buffer in self.buffers.items()}
        for index, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            found[f"weight.{name}"] = parameter.detach()
            if self.average is not None:
                found[f"average.{name}"] = self.average.averages[index]
            moments = self.optimizer.state.get(parameter, {})
            for moment in _MOMENTS:
                if moment in moments:
                    found[f"{moment}.{name}"] = moments[moment]
        return found


def save_checkpoint(state: TrainingState, folder: Path, *, keep: int) -> Path:
    """Write the state of a run; older checkpoints beyond `keep` go once the new one is whole.

    Raises:
        ImpromptError: the disk is full or not writable; the previous checkpoint is untouched.
    """
    final = folder / f"step-{state.step:08d}"
    beside = folder / f"{final.name}.writing"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        tensors = {name: tensor.contiguous() for name, tensor in state.tensors().items()}
        save_file(tensors, beside / "state.safetensors")
        (beside / "counters.json").write_text(json.dumps({"step": state.step}), encoding="utf-8")
        for name in ("state.safetensors", "counters.json"):
            with open(beside / name, "rb") as file:
                os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        beside.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
        reason = "the disk is full" if full else str(error)
        raise ImpromptError(
            f"The checkpoint of step {state.step} could not be written to {folder}: {reason}. "
            "The one before it is whole; make room and run the same command again."
        ) from error
    for old in whole_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


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
    wanted = set(state.tensors()) | {f"{m}.{name}" for m in _MOMENTS for name in state.names}
    if wanted != set(tensors):
        odd = sorted(wanted ^ set(tensors))[:3]
        raise ImpromptError(
            f"The checkpoint {path} is of another model or optimiser: {', '.join(odd)} do not match."
        )
    step = int(counters["step"])
    with torch.no_grad():
        for name, buffer in state.buffers.items():
            buffer.copy_(tensors[f"buffer.{name}"])
        for index, (name, parameter) in enumerate(zip(state.names, state.parameters, strict=True)):
            parameter.copy_(tensors[f"weight.{name}"])
            if state.average is not None:
                state.average.averages[index].copy_(tensors[f"average.{name}"])
            state.optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                **{m: torch.empty_like(parameter).copy_(tensors[f"{m}.{name}"]) for m in _MOMENTS},
            }
    state.step = step
