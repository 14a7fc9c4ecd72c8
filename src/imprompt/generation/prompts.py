"""Image prompts as users write them, and their way to tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike

import numpy
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from imprompt.adapters import Handle, ImagePromptAdapter
from imprompt.adapters.sites import Number, Scale
from imprompt.bases import ClipImageEncoder
from imprompt.core.errors import ImpromptError
from imprompt.core.images import image_to_pixels, open_image
from imprompt.generation.conditions import TokenPrompt, check_time_span, is_zero

ImageLike = str | PathLike[str] | Image.Image | Tensor


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """A picture that says what to draw, with the adapter that makes it understood.

    Raises:
        ImpromptError: no image, or a time span that is none.
    """

    image: ImageLike | Sequence[ImageLike]
    """A file, a PIL image, or pixels (3, height, width) in [-1, 1]; or several of them, which are
    then read together, one after the other."""

    adapter: ImagePromptAdapter = field(kw_only=True, repr=False)
    """What was trained (or loaded) for the base that generates."""

    scale: Scale = field(default=1.0, kw_only=True)
    """λ, the weight beside the text: one number, one per cross-attention site, or a mapping from
    parts of the UNet ("up", "mid_block", …) to numbers. 0 costs nothing and does nothing."""

    mask: ImageLike | None = field(default=None, kw_only=True, repr=False)
    """Where it acts: white there, black elsewhere. A tensor is (height, width) in [0, 1]."""

    start: Number = field(default=0.0, kw_only=True)
    """When it begins to act, as a fraction of the steps."""

    end: Number = field(default=1.0, kw_only=True)
    """When it no longer acts, as a fraction of the steps."""

    def __post_init__(self) -> None:
        check_time_span(self.start, self.end)
        if not self.images:
            raise ImpromptError("An image prompt without an image was given: give one or more.")
        if not isinstance(self.adapter, ImagePromptAdapter):
            raise ImpromptError(
                f"An image prompt's adapter is a {type(self.adapter).__name__}; an adapter is "
                "needed, as imprompt.load_adapter and imprompt.create_adapter return it."
            )

    @property
    def images(self) -> tuple[ImageLike, ...]:
        """The image or images, always as a tuple."""
        if isinstance(self.image, str | PathLike | Image.Image | Tensor):
            return (self.image,)
        return tuple(self.image)

    @property
    def is_effective(self) -> bool:
        """Whether it acts at any step at all."""
        return not is_zero(self.scale) and self.start < self.end


@contextmanager
def installed(
    unet: nn.Module, adapters: Sequence[ImagePromptAdapter]
) -> Iterator[dict[ImagePromptAdapter, Handle]]:
    """Handles of adapters on a UNet for as long as the block runs, whatever ends it.

    Handles that others hold on the same UNet stay as they are.
    """
    handles: dict[ImagePromptAdapter, Handle] = {}
    try:
        for adapter in adapters:
            if adapter not in handles:
                handles[adapter] = adapter.install(unet)
        yield handles
    finally:
        for handle in reversed(handles.values()):
            handle.remove()


def token_prompt(
    prompt: ImagePrompt, handle: Handle, encoder: ClipImageEncoder | None
) -> TokenPrompt:
    """Encodes and projects a prompt's images.

    Raises:
        ImpromptError: an image cannot be read, or the adapter does not read what the encoder gives.
    """
    features, zero_features = _features(prompt, encoder)
    tokens = prompt.adapter.tokens(features)
    zero_tokens = prompt.adapter.tokens(zero_features)
    num_images = len(features)
    # Several images are one prompt: the attention reads the tokens of all of them.
    return TokenPrompt(
        handle=handle,
        tokens=tokens.flatten(0, 1)[None],
        zero_tokens=zero_tokens.repeat(1, num_images, 1),
        scale=prompt.scale,
        mask=None if prompt.mask is None else mask_to_tensor(prompt.mask)[None],
        start=prompt.start,
        end=prompt.end,
    )


def _features(prompt: ImagePrompt, encoder: ClipImageEncoder | None) -> tuple[Tensor, Tensor]:
    """What the adapter reads of each image, and what it reads of none."""
    adapter = prompt.adapter
    wanted = adapter.projection.features
    if [feature.name for feature in wanted] not in (["image_embeds"], ["hidden_states"]):
        raise ImpromptError(
            f"The {adapter.variant} adapter reads {', '.join(feature.name for feature in wanted)}; "
            "from an image alone only image_embeds or hidden_states can be had (the variants base, "
            "plus and full)."
        )
    if encoder is None:
        raise ImpromptError(
            "This base brings no image encoder: give generate() the one that the adapter was "
            "trained with, image_encoder=load_clip(...)."
        )
    is_sequence = wanted[0].is_sequence
    encoder_dim = encoder.hidden_dim if is_sequence else encoder.embed_dim
    if encoder_dim != wanted[0].dim:
        raise ImpromptError(
            f"The {adapter.variant} adapter reads {wanted[0].name} of {wanted[0].dim} numbers, but "
            f"the image encoder gives {encoder_dim}: it was trained with another encoder."
        )
    encode = encoder.hidden_states if is_sequence else encoder.embeds
    features = torch.cat([encode(to_pixels(image)[None]) for image in prompt.images])
    zeros = encoder.zero_hidden_states() if is_sequence else torch.zeros_like(features[:1])
    return features, zeros


def to_pixels(image: ImageLike) -> Float[Tensor, "3 height width"]:
    """Pixels in [-1, 1] of a file, a PIL image, or pixels."""
    if isinstance(image, Tensor):
        if image.ndim != 3 or len(image) != 3:
            raise ImpromptError(
                f"An image prompt has the shape {tuple(image.shape)}; pixels are (3, height, "
                "width) in [-1, 1]."
            )
        return image
    return image_to_pixels(open_image(image))


def mask_to_tensor(mask: ImageLike) -> Float[Tensor, "height width"]:
    """Where a prompt acts, in [0, 1]: of a file or PIL image its brightness."""
    if isinstance(mask, Tensor):
        if mask.ndim != 2:
            raise ImpromptError(
                f"A mask has the shape {tuple(mask.shape)}; (height, width) in [0, 1] is needed."
            )
        return mask.to(torch.float32)
    return torch.from_numpy(numpy.asarray(open_image(mask).convert("L"), dtype=numpy.float32) / 255)
