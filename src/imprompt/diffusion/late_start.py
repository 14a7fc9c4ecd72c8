"""Samplers that begin late, from a picture under noise instead of noise alone.

Source: SDEdit (2108.01073), section 3.2.
"""

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

SMALLEST_SHARE = 1e-6  # of a step: 0.7 of 10 steps are 7, whatever floating point makes of it


def last_timesteps(scheduler: Any, share: float) -> Shaped[Tensor, " steps"]:
    """Set a new sampler to its last `share`, in (0, 1], of steps (at least one) and return their timesteps.

    What is denoised from the first of them on has that step's `noise_level`.
    """
    num_steps = scheduler.num_inference_steps
    first = num_steps - max(1, int(num_steps * share + SMALLEST_SHARE))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    timesteps = scheduler.timesteps
    if len(timesteps) == num_steps:
        return timesteps[first:]
    # PNDM goes its first step twice, from wherever it begins: the second of its timesteps is there twice.
    each = torch.cat([timesteps[:1], timesteps[2:]])[first:]
    return torch.cat([each[:2], each[1:]])


def noise_level(scheduler: Any, timestep: Tensor) -> tuple[float, float]:
    """How much of x0 and of noise stands in latents before they are denoised at this timestep.

    For samplers that count their steps it must be the one that they are at.
    """
    # Of numbers, so that the scheduler's tables stay where they are.
    one, none, at = torch.ones(1), torch.zeros(1), timestep.reshape(1)
    return float(scheduler.add_noise(one, none, at)), float(scheduler.add_noise(none, one, at))
