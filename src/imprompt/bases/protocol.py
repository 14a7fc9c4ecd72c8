"""What everything above needs to know of a text-to-image model, and nothing more."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from imprompt.bases.clip_vision import ClipImageEncoder


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

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def image_size_px(self) -> int:
        """The side of the square images it was made for."""
        ...

    def parts(self) -> dict[str, nn.Module]:
        """The networks by the name of their folder."""
        ...

    def fingerprint(self) -> str:
        """Tells this base from every other: 16 hexadecimal digits."""
        ...

    def latent_shape(self, size_px: int | tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of one image of (height, width) pixels."""
        ...

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "batch length"]:
        """Token ids, padded or cut to the text encoder's length."""
        ...

    def encode_text(
        self, texts: Sequence[str] | Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length dim"]:
        """The states that the denoiser's cross-attention reads."""
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
        text_states: Float[Tensor, "batch length dim"],
        condition: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "batch channels h w"]:
        """The denoiser's prediction (of the kind its scheduler's `prediction_type` names)."""
        ...
