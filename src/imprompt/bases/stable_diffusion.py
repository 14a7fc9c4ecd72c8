"""Stable Diffusion 1.x and 2.x, and every model that is built the same way, of any size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from imprompt.bases import latent_space
from imprompt.bases.clip_vision import ClipImageEncoder, fingerprint_of
from imprompt.bases.folder import (
    ModelIndex,
    load_autoencoder,
    load_image_encoder,
    load_scheduler,
    load_text_encoder,
    load_tokenizer,
    load_unet,
)
from imprompt.bases.latent_space import check_plain_latents
from imprompt.bases.residuals import Residuals
from imprompt.bases.text import TextStates
from imprompt.bases.turns import end_offload, working_device
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
        """Where it computes."""
        return working_device(self.unet)

    @property
    def image_size_px(self) -> int:
        """The side of the square images it was made for."""
        return latent_space.native_size_px(self.unet, self.vae)

    def parts(self) -> dict[str, nn.Module]:
        """The networks by the name of their folder."""
        parts = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        if self.image_encoder is not None:
            parts["image_encoder"] = self.image_encoder.model
        return parts

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Moves all networks in place."""
        networks = self.parts().values()
        end_offload(networks)
        for network in networks:
            nn.Module.to(network, device=device, dtype=dtype)

    def fingerprint(self) -> str:
        """Tells this base from every other: 16 hexadecimal digits."""
        return fingerprint_of(self.parts())

    def latent_shape(self, size_px: int | tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of one image of (height, width) pixels.

        Raises:
            ImpromptError: the autoencoder cannot make images of this size.
        """
        return latent_space.latent_shape(self.name, self.unet, self.vae, size_px)

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
    def encode_text(self, texts: Sequence[str | None] | Int[Tensor, "batch length"]) -> TextStates:
        """The last layer's states of texts, or of their token ids. None is the empty text."""
        ids = texts if isinstance(texts, Tensor) else self.tokenize([text or "" for text in texts])
        return TextStates(self.text_encoder(ids.to(self.device)).last_hidden_state)

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

    def text_arguments(
        self, latents: Float[Tensor, "batch channels h w"], text_states: TextStates
    ) -> dict[str, Any]:
        """How text reaches the UNet, or a ControlNet made from it: as keyword arguments."""
        return {"encoder_hidden_states": text_states.sequence}


def load_stable_diffusion(
    source: Path | str,
    *,
    name: str,
    index: ModelIndex,
    dtype: torch.dtype,
    device: torch.device | str,
) -> StableDiffusionBase:
    """Reads a diffusers folder, or a model hub's repository of the same layout.

    A `Path` is a folder and is read without any network access; a `str` is a repository's id.
    Raises:
        ImpromptError: a part is missing or damaged, or the model is of another kind.
    """
    unet = load_unet(source, name, dtype)
    if unet.config.addition_embed_type is not None:
        raise ImpromptError(
            f"{name} is not of Stable Diffusion 1's or 2's kind: its UNet also wants "
            f"{unet.config.addition_embed_type!r} conditions, as Stable Diffusion XL's does, but "
            "there is no second text encoder."
        )
    vae = load_autoencoder(source, name, dtype)
    check_plain_latents(name, unet, vae)
    image_encoder = None
    if "image_encoder" in index.parts:
        image_encoder = load_image_encoder(source, name, dtype)
    base = StableDiffusionBase(
        name=name,
        unet=unet,
        vae=vae,
        text_encoder=load_text_encoder(source, name, dtype),
        tokenizer=load_tokenizer(source, name),
        scheduler=load_scheduler(source, name),
        image_encoder=image_encoder,
    )
    base.to(device)
    return base
