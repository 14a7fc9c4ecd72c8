"""DeepSpeed's ZeRO-2, the engine of the IP-Adapter paper: optimiser state and gradients are shared out.

Source: Rajbhandari et al. (1910.02054), section 5.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.systems.protocol import Figures
from imprompt.training.config import TrainConfig
from imprompt.training.optim import create_optimizer
from imprompt.training.parallel import Step, check_same_weights, trained_parameters
from imprompt.training.processes import Processes

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine:
    """Weights are whole in every process; moments and gradients are cut into as many parts."""

    def __init__(self, processes: Processes, step: Step, config: TrainConfig) -> None:
        deepspeed = _import_deepspeed()
        self.processes = processes
        self.parameters = [p for _, p in trained_parameters(step.trained)]
        self._reached: set[int] = set()
        self._hooks = [
            parameter.register_hook(lambda gradient, index=index: self._reached.add(index))
            for index, parameter in enumerate(self.parameters)
        ]
        self._engine, *_ = deepspeed.initialize(
            model=step,
            model_parameters=self.parameters,
            optimizer=create_optimizer(self.parameters, config),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": config.batch_size
                // (processes.count * config.gradient_accumulation_steps),
                # One, and the boundary told by hand: the loop has scaled the loss already.
                "gradient_accumulation_steps": 1,
                "gradient_clipping": config.max_gradient_norm,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": 2, "overlap_comm": False},
            },
        )
        self._zero: Any = self._engine.optimizer
        if (
            self._engine.world_size != processes.count
            or self._engine.zero_optimization_stage() != 2
        ):
            raise ImpromptError(
                f"DeepSpeed runs {self._engine.world_size} processes of {processes.count}."
            )

    def loss(
        self, batch: dict[str, Tensor], randomness: Randomness, *, is_last: bool
    ) -> tuple[Tensor, Figures]:
        self._engine.set_gradient_accumulation_boundary(is_last)
        return self._engine(batch, randomness)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def without_gradient(self) -> list[int]:
        for hook in self._hooks:
            hook.remove()
        return [index for index in range(len(self.parameters)) if index not in self._reached]

    def update(self, learning_rate: float) -> Tensor:
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        # A number where a gradient overflowed: infinity, or the -1 of former versions.
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self.processes.device)
        return norm.where(norm >= 0, float("nan"))

    def check_synchronised(self) -> None:
        check_same_weights(self.processes, self.parameters)

    def whole(self, index: int, value: Tensor) -> Tensor:
        return value

    def part(self, index: int, value: Tensor) -> Tensor:
        return value

    def moments(self, index: int) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state  # type: ignore[import-not-found]

        if not any(self._zero.optimizer.state.values()):
            return {}
        parameter = self.parameters[index]
        found = {name: safe_get_full_optimizer_state(parameter, name) for name in _MOMENTS}
        return {name: value for name, value in found.items() if value is not None}

    def set_moments(self, index: int, moments: dict[str, Tensor], step: int) -> None:
        """The weights, of which DeepSpeed keeps a copy, must have been put back before."""
        from deepspeed.utils import (  # type: ignore[import-not-found]
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        if index == 0:
            self._make_room(step)
        parameter = self.parameters[index]
        safe_set_full_fp32_param(parameter, parameter.detach())
        for name in _MOMENTS:
            safe_set_full_optimizer_state(parameter, moments[name].to(parameter.device), name)

    def _make_room(self, step: int) -> None:
        """State as the optimiser makes it at its first step, which a resumed run has behind it."""
        for flat in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[flat] = {
                "step": torch.tensor(float(step), device=flat.device),
                **{name: torch.zeros_like(flat) for name in _MOMENTS},
            }
        self._zero._lazy_init_hp_params_optimizer_state()

    def whole_weights(self) -> AbstractContextManager[None]:
        return nullcontext()

    def counters(self) -> dict[str, Any]:
        return {}

    def set_counters(self, counters: dict[str, Any]) -> None:
        pass


def _import_deepspeed() -> Any:
    try:
        import deepspeed  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImpromptError(
            "The engine zero2 needs DeepSpeed: pip install 'imprompt[deepspeed]'."
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # Its kernel for processes of one machine is compiled when first used, and where that takes a
        # while the processes lose each other; gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
