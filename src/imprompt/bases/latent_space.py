"""Pixels to latents and back: what all bases around an `AutoencoderKL` have in common.

Pixels are float, RGB, NCHW, in [-1, 1]; latents are in the denoiser's scale. All of it runs in the
autoencoder's precision, on `device`.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.core.errors import ImpromptError


def pixels_per_latent(vae: Any) -> int:
    """How many pixels wide and high one latent is."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def native_size_px(unet: Any, vae: Any) -> int:
    """The side of the square images that a denoiser was made for."""
    sample_size = unet.config.sample_size
    if not isinstance(sample_size, int):
        sample_size = min(sample_size)
    return sample_size * pixels_per_latent(vae)


def height_and_width(size_px: int | tuple[int, int] | None, native_px: int) -> tuple[int, int]:
    """Both sides of a picture in pixels: of a square, as given, or of the native square."""
    size_px = native_px if size_px is None else size_px
    return (size_px, size_px) if isinstance(size_px, int) else size_px


def latent_shape(
    name: str, unet: Any, vae: Any, size_px: int | tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """(channels, height, width) of the latents of one image of (height, width) pixels.

    Raises:
        ImpromptError: the autoencoder cannot make images of this size.
    """
    native = native_size_px(unet, vae)
    height, width = height_and_width(size_px, native)
    factor = pixels_per_latent(vae)
    if min(height, width) < factor or height % factor or width % factor:
        raise ImpromptError(
            f"{name} cannot make images of {width} × {height} px: both sides must be "
            f"positive multiples of {factor} px (it was made for {native} px)."
        )
    return unet.config.in_channels, height // factor, width // factor


def check_plain_latents(name: str, unet: Any, vae: Any) -> None:
    """Raise an ImpromptError unless the denoiser reads the autoencoder's latents, and no strength of guidance."""
    if unet.config.get("time_cond_proj_dim") is not None:
        raise ImpromptError(
            f"{name} is distilled together with its guidance, of which its UNet reads the strength (a latent "
            'consistency model); give the model that it was made from, with an LCM-LoRA and the sampler "lcm".'
        )
    reads, gives = unet.config.in_channels, vae.config.latent_channels
    if reads != gives:
        raise ImpromptError(
            f"{name} is no plain text-to-image model: its UNet reads {reads} channels, its "
            f"autoencoder gives {gives}. The others are for a masked or a given picture (models for "
            "inpainting or editing); give the model that it was made from."
        )


@torch.no_grad()
def latent_distribution(
    vae: Any, pixels: Float[Tensor, "batch 3 height width"], device: torch.device
) -> tuple[Float[Tensor, "batch channels h w"], Float[Tensor, "batch channels h w"]]:
    """Mean and standard deviation of the latents of images."""
    pixels = pixels.to(device=device, dtype=vae.dtype)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    posterior = vae.encode(pixels).latent_dist
    factor = vae.config.scaling_factor
    return posterior.mean * factor, posterior.std * factor


def decode(
    vae: Any, latents: Float[Tensor, "batch channels h w"], device: torch.device
) -> Float[Tensor, "batch 3 height width"]:
    """Pixels of latents, not yet clipped to [-1, 1]."""
    latents = latents.to(device=device, dtype=vae.dtype)
    # A quarter faster on a CPU: the full-resolution convolutions read each pixel's channels.
    latents = latents.contiguous(memory_format=torch.channels_last)
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
