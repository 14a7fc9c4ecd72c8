"""Stable Diffusion 1.x and 2.x, and every model that is built the same way, of any size."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from imprompt.bases.clip_vision import ClipImageEncoder
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
from imprompt.bases.text import TextStates
from imprompt.bases.turns import end_offload
from imprompt.bases.unet_base import UNetBase
from imprompt.bases.words import token_ids
from imprompt.core.errors import ImpromptError


@final
class StableDiffusionBase(UNetBase):
    """A denoising UNet, an autoencoder, and CLIP's text encoder, all frozen.

    The parts are diffusers' and transformers' own classes and may be used as such.

    Source: Rombach et al. (2112.10752).
    """

    clip_skip: int = 1
    """Which of the text encoder's layers is read, counted from the last: 1 is the last, 2 the one before, which
    many fine-tunes were made with."""

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

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "batch length"]:
        """Token ids, padded or cut to the text encoder's length."""
        length = self.text_encoder.config.max_position_embeddings
        return token_ids(self.tokenizer, texts, length)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str | None] | Int[Tensor, "batch length"]) -> TextStates:
        """The states of texts, or of their token ids, in the layer that is read. None is the empty text."""
        ids = texts if isinstance(texts, Tensor) else self.tokenize([text or "" for text in texts])
        if self.clip_skip == 1:
            return TextStates(self.text_encoder(ids.to(self.device)).last_hidden_state)
        layers = self.text_encoder(ids.to(self.device), output_hidden_states=True).hidden_states
        # Whatever the layer, the last one's norm comes after it.
        model = getattr(self.text_encoder, "text_model", self.text_encoder)
        return TextStates(model.final_layer_norm(layers[-self.clip_skip]))

    def fingerprint(self) -> str:
        """Tells this base, and which layer of the text encoder it reads, from every other."""
        weights = super().fingerprint()
        if self.clip_skip == 1:
            return weights
        return hashlib.sha256(f"{weights} {self.clip_skip}".encode()).hexdigest()[:16]

    def instruct_states(
        self,
        texts: Sequence[str | None] | Int[Tensor, "batch ids"],
        text_states: TextStates | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """What an Instruct adapter reads of texts, or of their token ids: what the denoiser reads.

        `text_states` is what `encode_text` made of the same texts, and then serves as it is.
        """
        return (self.encode_text(texts) if text_states is None else text_states).sequence

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
