"""Optimiser, learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from imprompt.core.errors import ImpromptError
from imprompt.training.config import TrainConfig


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """The share of the full learning rate at a step (counted from 0): linear warm-up, then the schedule."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return warm
    progress = min(1.0, step / max(1, config.steps))
    return warm * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def create_optimizer(
    parameters: Sequence[nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, 1711.05101) in its fused form, or with moments in 8 bits (2110.02861).

    Raises:
        ImpromptError: 8 bits were asked for, and bitsandbytes or its GPU is missing.
    """
    chosen: dict[str, Any] = {
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        "betas": (0.9, config.beta2),
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **chosen, fused=True)
    try:
        if not torch.cuda.is_available():
            raise ImportError("there is no GPU")
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImpromptError(
            f"optimizer=adamw-8bit needs bitsandbytes and a GPU ({error}): pip install bitsandbytes, or "
            "take optimizer=adamw."
        ) from error
    return bitsandbytes.optim.AdamW8bit(parameters, **chosen)


class MovingAverage:
    """Exponential moving average of weights, which is what is validated and exported.

    The decay rises from 0.1 to its full value over the first steps, so that the start is soon forgotten.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = list(parameters)
        self.averages = [parameter.detach().clone() for parameter in parameters]
        self._trained: list[Tensor] | None = None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after step `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [_own_part(average) for average in self.averages]
        torch._foreach_lerp_(averages, [_own_part(p) for p in self.parameters], 1.0 - decay)

    @torch.no_grad()
    def __enter__(self) -> None:
        """Within the block the module holds the averages."""
        self._trained = [parameter.detach().clone() for parameter in self.parameters]
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.copy_(average)

    @torch.no_grad()
    def __exit__(self, *exception: object) -> None:
        assert self._trained is not None
        for parameter, value in zip(self.parameters, self._trained, strict=True):
            parameter.copy_(value)
        self._trained = None


def _own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, which is all of it unless weights are sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
