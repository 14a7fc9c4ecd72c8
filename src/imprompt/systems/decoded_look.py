"""Renders made to look as if an autoencoder had drawn them, for networks that must read both."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor

from imprompt.core.randomness import Randomness

MAX_NOISE = 0.08


def as_if_decoded(
    pixels: Float[Tensor, "batch 3 h w"], randomness: Randomness, max_softness: float
) -> Float[Tensor, "batch 3 h w"]:
    """Pixels in [-1, 1] with some softness (up to `max_softness` in [0, 1]) and a little noise."""
    soft = functional.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    softness = max_softness * randomness.uniform("softness")[:, None, None, None]
    noise = randomness.normal("noise", tuple(pixels.shape[1:]))
    noise = noise * (MAX_NOISE * randomness.uniform("noise level")[:, None, None, None])
    return torch.lerp(pixels, soft, softness) + noise
