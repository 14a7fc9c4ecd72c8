"""A small network that tells the embedded world's persons apart and finds their landmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from imprompt.core.errors import ImpromptError

NUM_LANDMARKS = 5
SIZE_PX = 64


def _convolution(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.SiLU(),
    )


class FaceNetwork(nn.Module):
    """Pixels (batch, 3, 64, 64) in [-1, 1] to who it is and where the face is.

    The landmarks are read off heat maps as their mean position, so to fractions of a pixel.
    """

    def __init__(self, width: int = 32, embed_dim: int = 512) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            _convolution(3, width, 2),
            _convolution(width, width, 1),
            _convolution(width, 2 * width, 2),
            _convolution(2 * width, 2 * width, 1),
        )
        self.coarse = nn.Sequential(
            _convolution(2 * width, 4 * width, 2), _convolution(4 * width, 4 * width, 1)
        )
        self.whole = nn.Sequential(
            _convolution(4 * width, 5 * width, 2), _convolution(5 * width, 5 * width, 1)
        )
        self.embed = nn.Linear(10 * width, embed_dim, bias=False)
        self.norm = nn.BatchNorm1d(embed_dim)
        self.heat_maps = nn.Sequential(
            _convolution(6 * width, width, 1), nn.Conv2d(width, NUM_LANDMARKS, 1)
        )

    @property
    def embed_dim(self) -> int:
        """Width of the identity vector."""
        return self.embed.out_features

    def forward(
        self, pixels: Float[Tensor, "batch 3 64 64"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch 5 2"]]:
        """The identity vector, not yet normalised, and landmarks as fractions of width and height."""
        fine = self.fine(pixels)
        coarse = self.coarse(fine)
        whole = self.whole(coarse)
        pooled = torch.cat([whole.mean(dim=(2, 3)), whole.amax(dim=(2, 3))], 1)
        spread = functional.interpolate(coarse, size=fine.shape[-2:], mode="bilinear")
        heat = self.heat_maps(torch.cat([fine, spread], 1)).float()
        return self.norm(self.embed(pooled)).float(), _mean_position(heat)


def _mean_position(heat: Float[Tensor, "batch points h w"]) -> Float[Tensor, "batch points 2"]:
    share = heat.flatten(2).softmax(2).unflatten(2, heat.shape[-2:])
    height, width = heat.shape[-2:]
    x = (torch.arange(width, device=heat.device) + 0.5) / width
    y = (torch.arange(height, device=heat.device) + 0.5) / height
    return torch.stack([(share.sum(2) * x).sum(2), (share.sum(3) * y).sum(2)], 2)


def load_face_network(path: Path) -> FaceNetwork:
    """What `imprompt train face-encoder` wrote, in float32.

    Raises:
        ImpromptError: there is no such file, or it is something else.
    """
    if not path.is_file():
        raise ImpromptError(
            f"There is no face encoder {path}; `imprompt train face-encoder` makes one."
        )
    try:
        weights: dict[str, Any] = load_file(path)
        network = FaceNetwork(
            width=weights["fine.0.0.weight"].shape[0], embed_dim=weights["embed.weight"].shape[0]
        )
        own = network.state_dict()
        network.load_state_dict({k: v.to(own[k].dtype) for k, v in weights.items()})
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ImpromptError(f"{path} is no face encoder of the embedded world: {error}") from error
    return network.eval().requires_grad_(False)
