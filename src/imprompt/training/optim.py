"""Optimiser, learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, schedule: str) -> float:
    """The share of the full learning rate at a step (counted from 0): linear warm-up, then the schedule."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    if schedule == "constant":
        return warm
    progress = min(1.0, step / max(1, steps))
    return warm * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def create_optimizer(
    parameters: Sequence[nn.Parameter], *, learning_rate: float, weight_decay: float, beta2: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 1711.05101) in its fused form."""
    return torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, beta2), fused=True
    )


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
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1.0 - decay)

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
