"""Stable Diffusion XL, and every model that is built the same way, of any size."""

from collections.abc import Sequence
from functools import lru_cache
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
    load_second_text_encoder,
    load_text_encoder,
    load_tokenizer,
    load_unet,
)
from imprompt.bases.latent_space import check_plain_latents, pixels_per_latent
from imprompt.bases.text import TextStates
from imprompt.bases.turns import end_offload
from imprompt.bases.unet_base import UNetBase
from imprompt.bases.words import token_ids
from imprompt.core.errors import ImpromptError

NUM_FRAMING = 6


@final
class StableDiffusionXLBase(UNetBase):
    """A denoising UNet, an autoencoder, and two of CLIP's text encoders, all frozen.

    Beside the states of both encoders the UNet reads a pooled text state and the picture's framing:
    how large the original was and which part of it is shown.

    The parts are diffusers' and transformers' own classes and may be used as such.

    Source: Podell et al. (2307.01952), sections 2.1 (encoders) and 2.2 (framing).
    """

    guidance_scale: float = 5.0
    reads_framing: bool = True

    def __init__(
        self,
        *,
        name: str,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        scheduler: Any,
        image_encoder: ClipImageEncoder | None = None,
        no_text_is_zero: bool = True,
    ):
        """`no_text_is_zero`: whether states of zero mean no text, or those of the empty text do."""
        self.name = name
        self.unet = unet
        self.vae = vae
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.tokenizer = tokenizer
        self.tokenizer_2 = tokenizer_2
        self.scheduler = scheduler
        self.image_encoder = image_encoder
        self.no_text_is_zero = no_text_is_zero
        for part in self.parts().values():
            part.eval().requires_grad_(False)

    def parts(self) -> dict[str, nn.Module]:
        """The networks by the name of their folder."""
        parts = {
            "unet": self.unet,
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "text_encoder_2": self.text_encoder_2,
        }
        if self.image_encoder is not None:
            parts["image_encoder"] = self.image_encoder.model
        return parts

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Moves all networks in place.

        In float16 the autoencoder stays in float32 if it says that it must: the numbers within
        Stable Diffusion XL's own exceed what float16 can hold.
        """
        networks = self.parts().values()
        end_offload(networks)
        is_half = (self.vae.dtype if dtype is None else dtype) == torch.float16
        vae_dtype = torch.float32 if is_half and self.vae.config.force_upcast else dtype
        for network in networks:
            own_dtype = vae_dtype if network is self.vae else dtype
            nn.Module.to(network, device=device, dtype=own_dtype)

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "batch length"]:
        """Token ids of both encoders side by side, padded or cut to the encoders' length."""
        pairs = (
            (self.tokenizer, self.text_encoder),
            (self.tokenizer_2, self.text_encoder_2),
        )
        ids = [
            token_ids(tokenizer, texts, encoder.config.max_position_embeddings)
            for tokenizer, encoder in pairs
        ]
        return torch.cat(ids, dim=1)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str | None] | Int[Tensor, "batch length"]) -> TextStates:
        """The penultimate states of both encoders side by side, and the second's pooled state.

        None is no text at all, which this model was trained to see as zeros.
        """
        ids = texts if isinstance(texts, Tensor) else self.tokenize([text or "" for text in texts])
        ids = ids.to(self.device)
        length = self.text_encoder.config.max_position_embeddings
        first = self.text_encoder(ids[:, :length], output_hidden_states=True)
        second = self.text_encoder_2(ids[:, length:], output_hidden_states=True)
        sequence = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        pooled = self._pooled(second.last_hidden_state, ids[:, length:])
        if self.no_text_is_zero and not isinstance(texts, Tensor):
            is_text = torch.tensor([text is not None for text in texts]).to(sequence)
            sequence = sequence * is_text[:, None, None]
            pooled = pooled * is_text[:, None]
        return TextStates(sequence, pooled)

    def _pooled(
        self, states: Float[Tensor, "batch length dim"], ids: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch pooled_dim"]:
        """The second encoder's state at the end of each text, projected.

        The published encoder's own `text_embeds` are those of the token with the largest number, which words
        that textual inversions bring have.
        """
        ends = (ids == self.tokenizer_2.eos_token_id).int().argmax(1)
        rows = torch.arange(len(ids), device=ids.device)
        return self.text_encoder_2.text_projection(states[rows, ends])

    @torch.no_grad()
    def instruct_states(
        self,
        texts: Sequence[str | None] | Int[Tensor, "batch ids"],
        text_states: TextStates | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """What an Instruct adapter reads of texts, or of their token ids. None is the empty text.

        These are the last states of the first encoder, which are not among the `text_states`: the
        denoiser reads the penultimate ones.

        Source: IP-Adapter-Instruct (2408.03209), the pipeline for this model as published.
        """
        ids = texts if isinstance(texts, Tensor) else self.tokenize([text or "" for text in texts])
        length = self.text_encoder.config.max_position_embeddings
        return self.text_encoder(ids[:, :length].to(self.device)).last_hidden_state

    def text_arguments(
        self, latents: Float[Tensor, "batch channels h w"], text_states: TextStates
    ) -> dict[str, Any]:
        """How texts and framing reach the UNet, or a ControlNet made from it: as keyword arguments."""
        framing = text_states.framing
        if framing is None:
            factor = pixels_per_latent(self.vae)
            height, width = (factor * side for side in latents.shape[-2:])
            framing = _whole_picture_there(height, width, latents.device).expand(len(latents), -1)
        return {
            "encoder_hidden_states": text_states.sequence,
            "added_cond_kwargs": {"text_embeds": text_states.pooled, "time_ids": framing},
        }


def whole_picture(height_px: int, width_px: int) -> Float[Tensor, "1 6"]:
    """The framing of a picture that is shown whole, at the size it has."""
    sizes = [height_px, width_px]
    return torch.tensor([[*sizes, 0, 0, *sizes]], dtype=torch.float32)


@lru_cache(maxsize=64)
def _whole_picture_there(
    height_px: int, width_px: int, device: torch.device
) -> Float[Tensor, "1 6"]:
    """The same on a device, where every step of a generation reads it: brought there once."""
    with torch.inference_mode(False):  # it may serve training later
        return whole_picture(height_px, width_px).to(device)


def load_stable_diffusion_xl(
    source: Path | str,
    *,
    name: str,
    index: ModelIndex,
    dtype: torch.dtype,
    device: torch.device | str,
) -> StableDiffusionXLBase:
    """Reads a diffusers folder, or a model hub's repository of the same layout.

    A `Path` is a folder and is read without any network access; a `str` is a repository's id.

    Raises:
        ImpromptError: a part is missing or damaged, or the model is of another kind.
    """
    unet = load_unet(source, name, dtype)
    # Read in full, as half precision might not do for it.
    vae = load_autoencoder(source, name, torch.float32)
    check_plain_latents(name, unet, vae)
    second = load_second_text_encoder(source, name, dtype)
    check_reads_framing(name, unet, second)
    image_encoder = None
    if "image_encoder" in index.parts:
        image_encoder = load_image_encoder(source, name, dtype)
    base = StableDiffusionXLBase(
        name=name,
        unet=unet,
        vae=vae,
        text_encoder=load_text_encoder(source, name, dtype),
        text_encoder_2=second,
        tokenizer=load_tokenizer(source, name),
        tokenizer_2=load_tokenizer(source, name, "tokenizer_2"),
        scheduler=load_scheduler(source, name),
        image_encoder=image_encoder,
        no_text_is_zero=bool(index.settings.get("force_zeros_for_empty_prompt", True)),
    )
    base.to(device, dtype)
    return base


def check_reads_framing(name: str, unet: Any, second_text_encoder: Any) -> None:
    """Raise an ImpromptError unless a UNet wants what Stable Diffusion XL's wants."""
    config = unet.config
    is_xl = config.addition_embed_type == "text_time"
    wanted = config.projection_class_embeddings_input_dim if is_xl else None
    given = second_text_encoder.config.projection_dim
    given += NUM_FRAMING * (config.addition_time_embed_dim or 0)
    if wanted != given:
        raise ImpromptError(
            f"{name} is not of Stable Diffusion XL's kind: its UNet reads "
            f"{config.addition_embed_type or 'no'} conditions of {wanted or 0} numbers beside the "
            f"text, and the pooled text state and {NUM_FRAMING} sizes make {given}."
        )
