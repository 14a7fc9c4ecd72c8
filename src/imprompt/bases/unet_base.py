"""What all bases around a denoising UNet and an autoencoder have in common."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from imprompt.bases import latent_space
from imprompt.bases.clip_vision import fingerprint_of
from imprompt.bases.residuals import Residuals
from imprompt.bases.text import TextStates
from imprompt.bases.turns import working_device

ENCODERS = ("vae", "image_encoder")
SOME_TEXT = "A photo of 3 cats, beside a house."
"""What a tokenizer is known by, with the empty text."""


class UNetBase(ABC):
    """A base but for how it reads texts, which its kinds do each in their own way."""

    name: str
    unet: Any
    vae: Any
    guidance_scale: float = 7.5
    """How strongly it is best guided by text, where nothing else is asked for."""
    reads_framing: bool = False
    """Whether the denoiser is conditioned on original size, crop and target size (`TextStates.framing`)."""

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The networks by the name of their folder."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "batch length"]:
        """Token ids, padded or cut to the text encoder's length."""

    @abstractmethod
    def text_arguments(
        self, latents: Float[Tensor, "batch channels h w"], text_states: TextStates
    ) -> dict[str, Any]:
        """How text reaches the UNet, or a ControlNet made from it: as keyword arguments."""

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return working_device(self.unet)

    @property
    def image_size_px(self) -> int:
        """The side of the square images it was made for."""
        return latent_space.native_size_px(self.unet, self.vae)

    def fingerprint(self) -> str:
        """Tells this base from every other: 16 hexadecimal digits."""
        return fingerprint_of(self.parts())

    def encoders_fingerprint(self) -> str:
        """Tells apart what data are prepared with, autoencoder, image encoder and tokenizer: 16 hexadecimal digits.

        Bases that differ in denoiser and text encoder alone, as fine-tunes of one model do, read the same data.
        """
        parts = self.parts()
        digest = hashlib.sha256()
        digest.update(fingerprint_of({n: parts[n] for n in ENCODERS if n in parts}).encode())
        digest.update(self.tokenize(["", SOME_TEXT]).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def latent_shape(self, size_px: int | tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of one image of (height, width) pixels.

        Raises:
            ImpromptError: the autoencoder cannot make images of this size.
        """
        return latent_space.latent_shape(self.name, self.unet, self.vae, size_px)

    def latent_distribution(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch channels h w"], Float[Tensor, "batch channels h w"]]:
        """Mean and standard deviation of the latents of images, in the denoiser's scale."""
        return latent_space.latent_distribution(self.vae, pixels, self.device)

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
        return latent_space.decode(self.vae, latents, self.device)

    def denoise(
        self,
        latents: Float[Tensor, "batch channels h w"],
        timesteps: Tensor | int,
        text_states: TextStates,
        condition: Mapping[str, Any] | None = None,
        residuals: Residuals | None = None,
    ) -> Float[Tensor, "batch channels h w"]:
        """The denoiser's prediction (of the kind its scheduler's `prediction_type` names).

        `condition` is what an installed adapter's handle made of its tokens, `residuals` what
        controls add. Gradients flow.
        """
        return self.unet(
            latents,
            timesteps,
            **self.text_arguments(latents, text_states),
            **({} if residuals is None else residuals.arguments()),
            cross_attention_kwargs=condition,
            return_dict=False,
        )[0]
