"""Autoencoder: images to latents and back, the first stage of latent diffusion.

Source: Rombach et al. 2021 (2112.10752), section 3.1: reconstruction with a slight KL penalty towards a
standard normal, so that latents have a bounded variance. Perceptual and adversarial losses need networks
trained elsewhere; in their place stand terms for edges and for coarse colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL
from torch import Tensor

from imprompt.bases import Base
from imprompt.core.config import check_range
from imprompt.core.images import pixels_of_bytes
from imprompt.core.randomness import Randomness
from imprompt.data.rows import Rows
from imprompt.systems.protocol import Figures, starts_from_base


def create_autoencoder() -> Any:
    """The diorama base's autoencoder: 64-pixel images to 16 × 16 latents of 8 channels.

    Its full-resolution level is narrow, since most of the arithmetic would be there.
    """
    model_class: Any = AutoencoderKL  # its signature says less than it takes
    autoencoder = model_class(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    # Two starts without which training stalls at the mean image: every residual branch begins at zero,
    # so that the whole is a plain filter bank, and the posterior begins with little noise.
    for name, weight in autoencoder.named_parameters():
        if ".resnets." in name and name.endswith("conv2.weight"):
            torch.nn.init.zeros_(weight)
    torch.nn.init.zeros_(autoencoder.quant_conv.weight[8:])
    torch.nn.init.constant_(autoencoder.quant_conv.bias[8:], -5.0)
    return autoencoder


@dataclass(frozen=True, kw_only=True)
class AutoencoderOptions:
    """What is trained."""

    start: str = "new"
    """`new` for random weights, `base` to go on with the base's autoencoder."""
    kl_weight: float = 3e-4
    """Weight of the pull towards a standard normal."""

    def __post_init__(self) -> None:
        check_range(self, ("kl_weight",), 0)


def build(options: AutoencoderOptions, base: Base, columns: Rows) -> AutoencoderSystem:
    """The system for a column of pixels."""
    module = (
        base.vae.requires_grad_(True) if starts_from_base(options.start) else create_autoencoder()
    )
    module = module.to(base.device, memory_format=torch.channels_last)
    return AutoencoderSystem(module, options.kl_weight)


class AutoencoderSystem:
    """Trains an `AutoencoderKL` on the column `pixels` (uint8, (rows, 3, size, size))."""

    columns = ("pixels",)

    def __init__(self, module: Any, kl_weight: float = 3e-4) -> None:
        self.module = module
        self.kl_weight = kl_weight

    def _reconstruct(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        moments = self.module.quant_conv(self.module.encoder(pixels))
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(-20.0, 5.0)
        latents = mean + (0.5 * log_variance).exp() * noise
        return self.module.decoder(self.module.post_quant_conv(latents)), mean, log_variance

    def reconstructed(self, pixels: Tensor) -> Tensor:
        """Pixels (batch, 3, size, size) in [-1, 1], decoded from the mean of their latents."""
        return self.module.decode(self.module.encode(pixels).latent_dist.mean).sample

    def loss(self, batch: dict[str, Tensor], randomness: Randomness) -> tuple[Tensor, Figures]:
        pixels = pixels_of_bytes(batch["pixels"])
        flipped = torch.where(
            randomness.uniform("flip")[:, None, None, None] < 0.5, pixels, pixels.flip(3)
        )
        pixels = flipped.contiguous(memory_format=torch.channels_last)
        noise = randomness.normal("posterior", self._latent_shape(pixels))
        decoded, mean, log_variance = self._reconstruct(pixels, noise)
        reconstruction = reconstruction_loss(decoded.float(), pixels)
        mean, log_variance = mean.float(), log_variance.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        with torch.no_grad():
            error = (decoded.float() - pixels).abs().mean()
        return reconstruction + self.kl_weight * kl, {"l1": error, "kl": kl.detach()}

    def _latent_shape(self, pixels: Tensor) -> tuple[int, int, int]:
        config = self.module.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, pixels.shape[2] // factor, pixels.shape[3] // factor

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        pixels = pixels_of_bytes(batch["pixels"])
        decoded = self.reconstructed(pixels)
        squared = (decoded - pixels).square().mean().item() / 4.0
        return {
            "l1": (decoded - pixels).abs().mean().item(),
            "psnr_decibel": float(-10.0 * torch.log10(torch.tensor(squared))),
        }

    def export(self, path: Path) -> None:
        """Write the folder `path` as diffusers does. Latents keep unit scale: see `measure_scaling`."""
        self.module.save_pretrained(path)


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1 that counts edges and hue more, and differences between neighbours besides.

    Flat areas are most of a small picture: without weights, thin lines are learned last. Hue is learned
    late, too, since group normalisation takes the mean out of every map; so chroma (what is left after
    the grey value is taken away) has terms of its own, on the picture and on coarser copies.
    """
    horizontal = pixels[..., :, 1:] - pixels[..., :, :-1]
    vertical = pixels[..., 1:, :] - pixels[..., :-1, :]
    weight = torch.ones_like(pixels[:, :1])
    weight[..., :, 1:] += 3.0 * horizontal.abs().amax(1, keepdim=True)
    weight[..., 1:, :] += 3.0 * vertical.abs().amax(1, keepdim=True)
    error = decoded - pixels
    loss = (weight * error.abs()).mean()
    loss = loss + 0.5 * (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
    loss = loss + 0.5 * (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    chroma = error - error.mean(1, keepdim=True)
    loss = loss + 3.0 * (weight * chroma.abs()).mean()
    for factor in (4, 16):
        loss = loss + functional.avg_pool2d(error, factor).abs().mean()
        loss = loss + 2.0 * functional.avg_pool2d(chroma, factor).abs().mean()
    return loss


@torch.no_grad()
def measure_scaling(autoencoder: Any, pixels: Tensor) -> float:
    """The factor that gives latents unit variance over pixels (batch, 3, h, w) in [-1, 1]."""
    return 1.0 / autoencoder.encode(pixels).latent_dist.mean.std().item()
