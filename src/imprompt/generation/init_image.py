"""A picture to begin from: image-to-image, and with a mask inpainting.

Drawing begins late, from noise laid on the picture, so that what this noise leaves of it stays. With a mask, what
stays is given back after each step with as much noise as the step leaves, so that what is drawn anew fits to it,
and at the end to the pixel.

Source: SDEdit (2108.01073), section 3.2; RePaint (2201.09865), equation 8, for denoisers that know no masks.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch.nn.functional as functional
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from imprompt.adapters.sites import Number
from imprompt.bases import Base
from imprompt.bases.latent_space import height_and_width
from imprompt.core.errors import ImpromptError
from imprompt.core.images import pixels_to_images
from imprompt.generation.features import ImageLike, check_image_like, pixels_of_image_like
from imprompt.generation.masks import mask_to_tensor

MAX_SHAPES_DIFFER = 0.02
"""Of width through height of a picture and of its mask: sides are whole pixels."""


@dataclass(frozen=True, eq=False)
class InitImage:
    """A picture to begin from, and how much of it may change.

    Args:
        image: a file, a PIL image or pixels (3, height, width) in [-1, 1]. What is in its middle is taken,
            in the shape of what is drawn.
        strength: the share of the steps that are drawn, in (0, 1]; so much noise is laid on the picture.
            With 1 drawing begins from noise alone, so that nothing stays but what a mask keeps.
        mask: of the picture's shape: white is drawn anew, black stays, grey is in between; a picture or
            (height, width) in [0, 1]. None draws all of it anew.

    Raises:
        ImpromptError: `image` is no picture, or `strength` not in (0, 1].
    """

    image: ImageLike
    _: KW_ONLY
    strength: Number = 0.8
    mask: ImageLike | None = None

    def __post_init__(self) -> None:
        check_image_like(self.image)
        if not 0 < self.strength <= 1:
            raise ImpromptError(
                f"strength is {self.strength}, but must be above 0, which would draw nothing, and at most 1."
            )


@dataclass(frozen=True, eq=False)
class Start:
    """What the denoising loop begins from, the same for all pictures of a generation."""

    latents: Float[Tensor, "1 channels h w"]
    """Of the picture, in the denoiser's scale."""
    strength: float
    mask: Float[Tensor, "1 1 h w"] | None
    """1 where latents are drawn anew, 0 where they stay."""
    picture: Image.Image
    """As it was encoded."""
    drawn_anew: Image.Image | None
    """The mask in the picture's pixels."""

    def latents_with(
        self, noise: Float[Tensor, "images channels h w"], level: tuple[float, float]
    ) -> Float[Tensor, "images channels h w"]:
        """The picture's latents under noise; `level` is how much there is of either."""
        signal, deviation = level
        return signal * self.latents + deviation * noise

    def completed(self, images: list[Image.Image]) -> list[Image.Image]:
        """Drawn images, the picture's own pixels where the mask keeps them."""
        if self.drawn_anew is None:
            return images
        return [Image.composite(image, self.picture, self.drawn_anew) for image in images]


def start_of(init: InitImage, base: Base, size_px: int | tuple[int, int] | None) -> Start:
    """What a generation of this size begins from.

    Raises:
        ImpromptError: a picture cannot be read, the base cannot draw this size, or the mask has another shape
            than the picture.
    """
    sides = height_and_width(size_px, base.image_size_px)
    latent_sides = base.latent_shape(size_px)[1:]
    given = pixels_of_image_like(init.image)[None]
    pixels = _fitted(given, sides).clamp(-1, 1)
    mask = drawn_anew = None
    if init.mask is not None:
        values = mask_to_tensor(init.mask)[None, None].clamp(0, 1)
        _check_same_shape(given, values)
        values = _fitted(values, sides, mode="area")
        # A latent of which any pixel is drawn is drawn.
        mask = functional.adaptive_max_pool2d(values, latent_sides).to(base.device, base.dtype)
        drawn_anew = pixels_to_images((2 * values - 1).expand(-1, 3, -1, -1))[0].convert("L")
    latents = base.encode_image(pixels).to(base.device, base.dtype)
    picture = pixels_to_images(pixels)[0]
    return Start(latents, float(init.strength), mask, picture, drawn_anew)


def _fitted(
    values: Float[Tensor, "1 channels height width"], sides: tuple[int, int], mode: str = "bicubic"
) -> Float[Tensor, "1 channels new_height new_width"]:
    """What is in the middle, as large as possible, scaled to (height, width)."""
    height, width = values.shape[-2:]
    ratio = max(sides[0] / height, sides[1] / width)
    scaled = (max(sides[0], round(height * ratio)), max(sides[1], round(width * ratio)))
    if scaled != (height, width):
        antialias = mode == "bicubic"
        values = functional.interpolate(values.float(), scaled, mode=mode, antialias=antialias)
    top, left = (scaled[0] - sides[0]) // 2, (scaled[1] - sides[1]) // 2
    return values[..., top : top + sides[0], left : left + sides[1]]


def _check_same_shape(picture: Tensor, mask: Tensor) -> None:
    """Raise an ImpromptError if a mask's sides are in another ratio than the picture's."""
    (height, width), (mask_height, mask_width) = picture.shape[-2:], mask.shape[-2:]
    ratio = (width / height) / (mask_width / mask_height)
    if abs(ratio - 1) > MAX_SHAPES_DIFFER:
        raise ImpromptError(
            f"The picture to begin from is {width} × {height} px, its mask {mask_width} × {mask_height}: "
            "they need the same shape."
        )
