"""What everything above needs to know of a text-to-image model, and nothing more."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from imprompt.bases.clip_vision import ClipImageEncoder
from imprompt.bases.residuals import Residuals
from imprompt.bases.text import TextStates
from imprompt.core.errors import ImpromptError


@runtime_checkable  # for the type checks of the tests
class Base(Protocol):
    """A frozen latent diffusion model. Pixels are float, RGB, NCHW, in [-1, 1]."""

    name: str
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    image_encoder: ClipImageEncoder | None
    guidance_scale: float
    """How strongly it is best guided by text, where nothing else is asked for."""
    reads_framing: bool
    """Whether the denoiser reads of which picture it sees which part: `TextStates.framing`."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def image_size_px(self) -> int:
        """The side of the square images it was made for."""
        ...

    def parts(self) -> dict[str, nn.Module]:
        """The networks by the name of their folder."""
        ...

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Moves all networks in place."""
        ...

    def fingerprint(self) -> str:
        """Tells this base from every other: 16 hexadecimal digits."""
        ...

    def encoders_fingerprint(self) -> str:
        """Tells apart what data are prepared with, autoencoder, image encoder and tokenizer: 16 hexadecimal digits.

        Bases that differ in denoiser and text encoder alone, as fine-tunes of one model do, read the same data.
        """
        ...

    def latent_shape(self, size_px: int | tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of one image of (height, width) pixels."""
        ...

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "batch length"]:
        """Token ids, padded or cut to the text encoder's length; of several encoders side by side."""
        ...

    def encode_text(self, texts: Sequence[str | None] | Int[Tensor, "batch length"]) -> TextStates:
        """What the denoiser reads of texts, or of their token ids.

        None is what this model takes for no text at all, which guidance leads away from.
        """
        ...

    def instruct_states(
        self,
        texts: Sequence[str | None] | Int[Tensor, "batch ids"],
        text_states: TextStates | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """What an Instruct adapter reads of texts and instructions, or of their token ids.

        These are the last states of the text encoder, of the first one where there are several.
        None is the empty text. `text_states` is what `encode_text` made of the same texts: where
        it holds these states, nothing is encoded again.
        """
        ...

    def latent_distribution(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch channels h w"], Float[Tensor, "batch channels h w"]]:
        """Mean and standard deviation of the latents of images, in the denoiser's scale."""
        ...

    def encode_image(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        noise: Float[Tensor, "batch channels h w"] | None = None,
    ) -> Float[Tensor, "batch channels h w"]:
        """Latents in the denoiser's scale: mean + standard deviation · noise, the mean without."""
        ...

    def decode_image(
        self, latents: Float[Tensor, "batch channels h w"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Pixels of latents, not yet clipped to [-1, 1]."""
        ...

    def denoise(
        self,
        latents: Float[Tensor, "batch channels h w"],
        timesteps: Tensor | int,
        text_states: TextStates,
        condition: Mapping[str, Any] | None = None,
        residuals: Residuals | None = None,
    ) -> Float[Tensor, "batch channels h w"]:
        """The denoiser's prediction (of the kind its scheduler's `prediction_type` names).

        `residuals` is what controls add within it.
        """
        ...

    def text_arguments(
        self, latents: Float[Tensor, "batch channels h w"], text_states: TextStates
    ) -> dict[str, Any]:
        """How text reaches the UNet, or a ControlNet made from it: as keyword arguments."""
        ...


def image_encoder_of(base: Base) -> ClipImageEncoder:
    """The encoder that reads image prompts for this base.

    Raises:
        ImpromptError: it has none.
    """
    if base.image_encoder is None:
        raise ImpromptError(
            f"{base.name} has no image encoder, which image prompts need: name one with "
            "--image-encoder (h94/IP-Adapter:models/image_encoder is ViT-H), or put it into the "
            "base's folder as image_encoder/."
        )
    return base.image_encoder
