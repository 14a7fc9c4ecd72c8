"""Which engine a run is computed by, and what it cannot do."""

from __future__ import annotations

import torch

from imprompt.core.errors import ImpromptError
from imprompt.systems.protocol import System
from imprompt.training.config import TrainConfig
from imprompt.training.parallel import Engine, Step, WholeEngine
from imprompt.training.processes import Processes


def create_engine(processes: Processes, system: System, config: TrainConfig) -> Engine:
    """Make the system ready to be trained by these processes.

    Raises:
        ImpromptError: what an engine needs is not installed, or it cannot do what is asked.
    """
    share = processes.count * config.gradient_accumulation_steps
    if config.batch_size % share:
        raise ImpromptError(
            f"A batch of {config.batch_size} cannot be cut into {share} equal parts, for "
            f"{processes.count} processes and {config.gradient_accumulation_steps} accumulation steps; "
            f"train.batch_size must be a multiple of {share}."
        )
    if processes.engine in ("zero2", "fsdp2"):
        for name, unfit in (("precision", "float16"), ("optimizer", "adamw-8bit")):
            if getattr(config, name) == unfit:
                raise ImpromptError(
                    f"{name}={unfit} goes with single and ddp, not {processes.engine}."
                )
        if processes.engine == "fsdp2" and getattr(system, "calls_differ", False):
            raise ImpromptError(
                "These options ask the denoiser more often in one process than in another, which fsdp2, where "
                "every call gathers weights from all, would wait for in vain. Train with ddp or zero2."
            )
        # What is cut into slices must lie in order. A copy, for kernels of one pixel are called contiguous
        # however they lie.
        for parameter in system.module.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    step = Step(system, config.precision, processes.device)
    if processes.engine == "zero2":
        from imprompt.training.zero import ZeroEngine

        return ZeroEngine(processes, step, config)
    if processes.engine == "fsdp2":
        from imprompt.training.sharded import ShardedEngine

        return ShardedEngine(processes, step, system, config)
    return WholeEngine(processes, step, config)
