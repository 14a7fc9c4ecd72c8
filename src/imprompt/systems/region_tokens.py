"""Tokens that say what stands where: each of them one cell of a square grid over the image.

A resampler's queries begin alike, each a mean of all patches, which tells what is in an image and not
where. That they part and look at places is what training with the denoiser teaches last, if at all. Taught
by regression the mean of the patches of a cell, as many numbers of it as a token has, they do so within
some hundred cheap steps, and layouts become readable.

Ours, not of a paper; IP-Adapter-Full gives every patch a token of its own to the same end.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapters import ImagePromptAdapter, create_adapter
from imprompt.bases import Base
from imprompt.core.errors import ImpromptError

DIRECTIONS_SEED = 0


def cells(
    states: Float[Tensor, "batch length dim"], count: int
) -> Float[Tensor, "batch {count} dim"]:
    """The mean state of the patches in each of `count` cells, row by row from the top left.

    states: of an encoder's patches, square, row by row; a class token before them is left out.

    Raises:
        ImpromptError: `count` or the number of patches is not a square.
    """
    side, patches = isqrt(count), isqrt(states.shape[1])
    if side**2 != count:
        raise ImpromptError(f"region_tokens is {count}; choose a square number: 4, 9, 16, ….")
    if states.shape[1] - patches**2 not in (0, 1):
        raise ImpromptError(
            f"The image encoder gives {states.shape[1]} states, which are no square of patches."
        )
    grid = states[:, -(patches**2) :].transpose(1, 2).unflatten(2, (patches, patches))
    return functional.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2)


class Regions:
    """What region tokens are taught: cells along fixed directions, in units of their deviation."""

    def __init__(
        self, states: Float[Tensor, "images length feature_dim"], count: int, dim: int
    ) -> None:
        """states: of some images, for mean and deviation. dim: numbers of a token."""
        self._count = count
        generator = torch.Generator().manual_seed(DIRECTIONS_SEED)
        directions = torch.empty(states.shape[-1], dim)
        nn.init.orthogonal_(directions, generator=generator)
        self._directions = directions.to(states.device)
        seen = cells(states, count) @ self._directions
        self._mean, self._deviation = seen.mean((0, 1)), seen.std((0, 1))

    def __call__(
        self, states: Float[Tensor, "batch length feature_dim"]
    ) -> Float[Tensor, "batch regions dim"]:
        """What is in each cell, about 0 with a deviation of 1."""
        return (cells(states, self._count) @ self._directions - self._mean) / self._deviation


@torch.no_grad()
def with_more_tokens(adapter: ImagePromptAdapter, base: Base, count: int) -> ImagePromptAdapter:
    """The same adapter with `count` tokens more, new ones, after its own."""
    weights = adapter.state_dict()
    latents = weights["image_proj.latents"]
    depth = len(adapter.image_proj.get_submodule("layers")._modules)
    grown = create_adapter(
        base.unet,
        adapter.variant,
        feature_dim=adapter.projection.features[0].dim,
        num_tokens=latents.shape[1] + count,
        resampler_dim=latents.shape[2],
        depth=depth,
    )
    new = grown.state_dict()["image_proj.latents"][:, -count:].to(latents)
    grown.load_state_dict({**weights, "image_proj.latents": torch.cat([latents, new], dim=1)})
    grown.metadata.update(adapter.metadata)
    return grown.to(latents.device)
