"""A small network that tells the embedded world's persons apart and finds their landmarks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.encoders.small_network import convolution, load_small_network

NUM_LANDMARKS = 5
SIZE_PX = 64


class FaceNetwork(nn.Module):
    """Pixels (batch, 3, 64, 64) in [-1, 1] to who it is and where the face is.

    The landmarks are read off heat maps as their mean position, so to fractions of a pixel.
    """

    def __init__(self, width: int = 32, embed_dim: int = 512) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            convolution(3, width, 2),
            convolution(width, width, 1),
            convolution(width, 2 * width, 2),
            convolution(2 * width, 2 * width, 1),
        )
        self.coarse = nn.Sequential(
            convolution(2 * width, 4 * width, 2), convolution(4 * width, 4 * width, 1)
        )
        self.whole = nn.Sequential(
            convolution(4 * width, 5 * width, 2), convolution(5 * width, 5 * width, 1)
        )
        self.embed = nn.Linear(10 * width, embed_dim, bias=False)
        self.norm = nn.BatchNorm1d(embed_dim)
        self.heat_maps = nn.Sequential(
            convolution(6 * width, width, 1), nn.Conv2d(width, NUM_LANDMARKS, 1)
        )

    @property
    def embed_dim(self) -> int:
        """Width of the identity vector."""
        return self.embed.out_features

    def forward(
        self, pixels: Float[Tensor, "batch 3 64 64"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch 5 2"]]:
        """The identity vector, not yet normalised, and landmarks as fractions of width and height."""
        fine, coarse, _, identity = self.layers(pixels)
        spread = functional.interpolate(coarse, size=fine.shape[-2:], mode="bilinear")
        heat = self.heat_maps(torch.cat([fine, spread], 1)).float()
        return identity.float(), _mean_position(heat)

    def layers(
        self, pixels: Float[Tensor, "batch 3 64 64"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All it makes of pixels on the way to who it is: three maps (batch, channels, side, side), of sides
        16, 8 and 4, and the identity vector (batch, dim), not yet normalised."""
        fine = self.fine(pixels)
        coarse = self.coarse(fine)
        whole = self.whole(coarse)
        pooled = torch.cat([whole.mean(dim=(2, 3)), whole.amax(dim=(2, 3))], 1)
        return fine, coarse, whole, self.norm(self.embed(pooled))


def _mean_position(heat: Float[Tensor, "batch points h w"]) -> Float[Tensor, "batch points 2"]:
    share = heat.flatten(2).softmax(2).unflatten(2, heat.shape[-2:])
    height, width = heat.shape[-2:]
    x = (torch.arange(width, device=heat.device) + 0.5) / width
    y = (torch.arange(height, device=heat.device) + 0.5) / height
    return torch.stack([(share.sum(2) * x).sum(2), (share.sum(3) * y).sum(2)], 2)


def as_the_network_reads(
    pixels: Float[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 64 64"]:
    """Pixels of any size, in about [-1, 1], as `FaceNetwork` reads them; gradients pass through."""
    pixels = pixels.clamp(-1, 1)
    if pixels.shape[-2:] == (SIZE_PX, SIZE_PX):
        return pixels
    resized = functional.interpolate(
        pixels, size=(SIZE_PX, SIZE_PX), mode="bicubic", antialias=True
    )
    return resized.clamp(-1, 1)


def load_face_network(path: Path) -> FaceNetwork:
    """What `imprompt train face-encoder` wrote, in float32.

    Raises:
        ImpromptError: there is no such file, or it is something else.
    """
    return load_small_network(
        path,
        lambda weights: FaceNetwork(
            width=weights["fine.0.0.weight"].shape[0], embed_dim=weights["embed.weight"].shape[0]
        ),
        what="face encoder of the embedded world",
        hint="`imprompt train face-encoder` makes one",
    )
