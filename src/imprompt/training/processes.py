"""The processes that train together: how many there are, which is this one, and what they tell each other."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from imprompt.bases.placement import checked_device, default_device
from imprompt.core.errors import ImpromptError

ENGINES = ("single", "ddp", "zero2", "fsdp2")


@dataclass(frozen=True)
class Processes:
    """This process among those of a run, each with a device of its own."""

    engine: str
    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def gather(self, values: Tensor) -> Tensor:
        """What every process has, (processes, …)."""
        if self.count == 1:
            return values[None]
        found = [torch.empty_like(values) for _ in range(self.count)]
        dist.all_gather(found, values.contiguous())
        return torch.stack(found)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process. They wait for each other, but no device is waited for."""
        if self.count == 1:
            return flag
        seen = torch.tensor(int(flag))
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return bool(seen)

    def wait_for_all(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            self.any(False)


def join_processes(
    engine: str = "auto", expected: int | None = None, device: torch.device | str | None = None
) -> Processes:
    """Find the other processes of a run that torchrun (or another launcher) started.

    `auto` is one process, or DDP where a launcher started several. `expected` is how many there must be:
    some launchers start one and say nothing. `device` is where one process computes, by default a GPU
    where there is one; of several each takes its own.

    Raises:
        ImpromptError: an unknown engine, one without a launcher, or another number of processes; a device
            that is not there, or one for several processes.
    """
    launched = int(os.environ.get("WORLD_SIZE", "0"))
    if engine == "auto":
        engine = "ddp" if launched > 1 else "single"
    if engine not in ENGINES:
        raise ImpromptError(f"The engine {engine!r} is unknown; choose {', '.join(ENGINES)}.")
    if engine == "single" and launched > 1:
        raise ImpromptError(
            f"{launched} processes were started, and the engine single is one; choose ddp, zero2 or fsdp2."
        )
    if engine != "single" and not launched:
        raise ImpromptError(
            f"The engine {engine} needs a launcher: torchrun --nproc_per_node 2 -m imprompt train …"
        )
    if engine == "single":
        chosen = default_device() if device is None else checked_device(device)
        processes = Processes(engine, 0, 1, chosen)
    elif device is not None:
        raise ImpromptError(
            f"The device {str(device)!r} is for one process, and the engine {engine} is for several, each "
            "with a device of its own: leave --device out, or start one process with --engine single."
        )
    else:
        processes = _join(engine, launched, torch.cuda.is_available())
    if expected is not None and processes.count != expected:
        raise ImpromptError(
            f"{expected} processes were asked for, and there {'are' if processes.count > 1 else 'is'} "
            f"{processes.count}: the launcher did not start them. Use torchrun --nproc_per_node {expected}."
        )
    return processes


def _join(engine: str, launched: int, cuda: bool) -> Processes:
    if not dist.is_initialized():
        # Flags travel over gloo, so that no device has to stop for them.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if dist.get_world_size() != launched:
        raise ImpromptError(
            f"The launcher promised {launched} processes and {dist.get_world_size()} have met."
        )
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return Processes(engine, dist.get_rank(), dist.get_world_size(), device)


def leave_processes(processes: Processes) -> None:
    """Part from the others in an orderly way; without it a launcher complains."""
    if processes.engine != "single" and dist.is_initialized():
        dist.destroy_process_group()
        # An engine may still refer to the group, whose threads then live on. They let go of the last
        # tensors a moment after the call that sent them has returned, and need the interpreter for it:
        # one that finds it ending aborts the process.
        time.sleep(0.5)
