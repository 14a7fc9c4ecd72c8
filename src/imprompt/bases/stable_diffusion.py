"""Stable Diffusion 1.x and 2.x, and every model that is built the same way, of any size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from imprompt.bases.clip_vision import ClipImageEncoder, fingerprint_of
from imprompt.bases.folder import (
    load_autoencoder,
    load_image_encoder,
    load_scheduler,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    part_names,
)
from imprompt.core.errors import ImpromptError


class StableDiffusionBase:
    """A denoising UNet, an autoencoder, and CLIP's text encoder, all frozen.

    The parts are diffusers' and transformers' own classes and may be used as such.

    Source: Rombach et al. (2112.10752).
    """

    def __init__(
        self,
        *,
        name: str,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        image_encoder: ClipImageEncoder | None = None,
    ):
        self.name = name
        self.unet = unet
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.image_encoder = image_encoder
        for part in self.parts().values():
            part.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels wide and high one latent is."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_size_px(self) -> int:
        """The side of the square images it was made for."""
        sample_size = self.unet.config.sample_size
        if not isinstance(sample_size, int):
            sample_size = min(sample_size)
        return sample_size * self.pixels_per_latent

    def parts(self) -> dict[str, nn.Module]:
        """The networks by the name of their folder."""
        parts = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        if self.image_encoder is not None:
            parts["image_encoder"] = self.image_encoder.model
        return parts

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Moves all parts in place."""
        for part in (self.unet, self.vae, self.text_encoder, self.image_encoder):
            if part is not None:
                nn.Module.to(part, device=device, dtype=dtype)

    def fingerprint(self) -> str:
        """Tells this base from every other: 16 hexadecimal digits."""
        return fingerprint_of(self.parts())

    def latent_shape(self, size_px: int | tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of one image of (height, width) pixels.

        Raises:
            ImpromptError: the autoencoder cannot make images of this size.
        """
        if size_px is None:
            size_px = self.image_size_px
        height, width = (size_px, size_px) if isinstance(size_px, int) else size_px
        factor = self.pixels_per_latent
        if min(height, width) < factor or height % factor or width % factor:
            raise ImpromptError(
                f"{self.name} cannot make images of {width} × {height} px: both sides must be "
                f"positive multiples of {factor} px (it was made for {self.image_size_px} px)."
            )
        return self.unet.config.in_channels, height // factor, width // factor

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "batch length"]:
        """Token ids, padded or cut to the text encoder's length."""
        return self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.text_encoder.config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    @torch.no_grad()
    def encode_text(
        self, texts: Sequence[str] | Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length dim"]:
        """The states that the denoiser's cross-attention reads."""
        ids = texts if isinstance(texts, Tensor) else self.tokenize(texts)
        return self.text_encoder(ids.to(self.device)).last_hidden_state

    @torch.no_grad()
    def latent_distribution(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch channels h w"], Float[Tensor, "batch channels h w"]]:
        """Mean and standard deviation of the latents of images, in the denoiser's scale."""
        pixels = pixels.to(device=self.device, dtype=self.vae.dtype)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(pixels).latent_dist
        factor = self.vae.config.scaling_factor
        return posterior.mean * factor, posterior.std * factor

    def encode_image(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        noise: Float[Tensor, "batch channels h w"] | None = None,
    ) -> Float[Tensor, "batch channels h w"]:
        """Latents in the denoiser's scale: mean + standard deviation · noise, the mean without."""
        mean, standard_deviation = self.latent_distribution(pixels)
        return mean if noise is None else mean + standard_deviation * noise.to(mean)

    @torch.no_grad()
    def decode_image(
        self, latents: Float[Tensor, "batch channels h w"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Pixels of latents, not yet clipped to [-1, 1]."""
        latents = latents.to(device=self.device, dtype=self.vae.dtype)
        # A quarter faster on a CPU: the full-resolution convolutions read each pixel's channels.
        latents = latents.contiguous(memory_format=torch.channels_last)
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]

    def denoise(
        self,
        latents: Float[Tensor, "batch channels h w"],
        timesteps: Tensor | int,
        text_states: Float[Tensor, "batch length dim"],
        condition: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "batch channels h w"]:
        """The denoiser's prediction (of the kind its scheduler's `prediction_type` names).

        `condition` is what an installed adapter's handle made of its tokens. Gradients flow.
        """
        return self.unet(
            latents,
            timesteps,
            encoder_hidden_states=text_states,
            cross_attention_kwargs=condition,
            return_dict=False,
        )[0]


def load_stable_diffusion(
    source: Path | str, *, name: str, dtype: torch.dtype, device: torch.device | str
) -> StableDiffusionBase:
    """Reads a diffusers folder, or a model hub's repository of the same layout.

    A `Path` is a folder and is read without any network access; a `str` is a repository's id.

    Raises:
        ImpromptError: a part is missing or damaged, or the model is of another kind.
    """
    parts = part_names(source, name)
    unet = load_unet(source, name, dtype)
    if unet.config.addition_embed_type is not None:
        raise ImpromptError(
            f"{name} is not of Stable Diffusion 1's or 2's kind: its UNet also wants "
            f"{unet.config.addition_embed_type!r} conditions, as Stable Diffusion XL's does."
        )
    image_encoder = None
    if "image_encoder" in parts:
        image_encoder = load_image_encoder(source, name, dtype)
    base = StableDiffusionBase(
        name=name,
        unet=unet,
        vae=load_autoencoder(source, name, dtype),
        text_encoder=load_text_encoder(source, name, dtype),
        tokenizer=load_tokenizer(source, name),
        scheduler=load_scheduler(source, name),
        image_encoder=image_encoder,
    )
    base.to(device)
    return base
