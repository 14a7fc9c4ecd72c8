"""From pictures to what an adapter reads of them: crops, encoding, and merging several into one."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy
import torch
import torch.nn.functional as functional
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imprompt.adapters.sites import Number
from imprompt.bases import ClipImageEncoder
from imprompt.core.errors import ImpromptError
from imprompt.core.images import image_to_pixels, open_image
from imprompt.core.tensor_files import write_tensors

ImageLike = str | PathLike[str] | Image.Image | Tensor | numpy.ndarray

CROPS = ("center", "pad", "stretch", "tiles")
MERGES = ("concat", "mean", "norm mean", "sum", "difference", "each")

SQUARES_AT_ONCE = 32

# What an autoencoder draws goes a little beyond 1; grey levels of 255 go far.
MAX_PIXEL = 2.0

# Before the name of what stands for no picture, in files.
ZERO = "zero_"


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageFeatures:
    """What an image encoder says of one picture or more; may be kept in a file and used again."""

    name: str
    """`image_embeds` (pictures, dim) or `hidden_states` (pictures, length, dim)"""
    values: Float[Tensor, "pictures *shape"]
    encoder_fingerprint: str
    zero_values: Float[Tensor, "one length dim"] | None = None
    """What stands for no picture beside `hidden_states`, which only the encoder can tell; None for
    `image_embeds`, where it is zero, and in files written before it was kept."""

    def save(self, path: str | PathLike[str]) -> None:
        """Write as safetensors.

        Raises:
            ImpromptError: the file cannot be written.
        """
        metadata = {"format": "imprompt-features", "encoder_fingerprint": self.encoder_fingerprint}
        tensors = {self.name: self.values.detach().cpu().contiguous()}
        if self.zero_values is not None:
            tensors[ZERO + self.name] = self.zero_values.detach().cpu().contiguous()
        write_tensors(tensors, Path(path), metadata)

    @staticmethod
    def load(path: str | PathLike[str]) -> "ImageFeatures":
        """Read what `save` wrote.

        Raises:
            ImpromptError: it is no such file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                is_known = metadata.get("format") == "imprompt-features"
                stored = list(file.keys()) if is_known else []
                tensors = {name: file.get_tensor(name) for name in stored}
        except (OSError, SafetensorError) as error:
            raise ImpromptError(f"{path} cannot be read as image features: {error}.") from error
        names = [name for name in tensors if not name.startswith(ZERO)]
        zeros = {name: tensor for name, tensor in tensors.items() if name not in names}
        if len(names) != 1 or any(
            name != ZERO + names[0] or zero.shape != (1, *tensors[names[0]].shape[1:])
            for name, zero in zeros.items()
        ):
            raise ImpromptError(
                f"{path} holds no image features: write them with ImageFeatures.save."
            )
        return ImageFeatures(
            name=names[0],
            values=tensors[names[0]],
            encoder_fingerprint=metadata["encoder_fingerprint"],
            zero_values=zeros.get(ZERO + names[0]),
        )


def encode_images(
    encoder: ClipImageEncoder,
    images: Sequence[ImageLike],
    name: str = "image_embeds",
    crop: str = "center",
) -> ImageFeatures:
    """Features of pictures, one row for each square that the crop makes of them.

    Args:
        name: `image_embeds` for base adapters, `hidden_states` for Plus, Full and Instruct.
        crop: see `squares`.

    Raises:
        ImpromptError: an image cannot be read, or there are no such features.
    """
    if name not in ("image_embeds", "hidden_states"):
        raise ImpromptError(f"There are no features {name!r}; use image_embeds or hidden_states.")
    images = [images] if isinstance(images, str) else images
    return ImageFeatures(
        name=name,
        values=encoded(encoder, images, name, crop),
        encoder_fingerprint=encoder.fingerprint(),
        zero_values=encoder.zero_hidden_states() if name == "hidden_states" else None,
    )


def encoded(
    encoder: ClipImageEncoder, images: Sequence[ImageLike], name: str, crop: str
) -> Float[Tensor, "squares *shape"]:
    """The values of `encode_images`."""
    encode = encoder.hidden_states if name == "hidden_states" else encoder.embeds
    pixels = [square for image in images for square in squares(pixels_of_image_like(image), crop)]
    # Of one size they go through the encoder together.
    resized = torch.cat([encoder.resized(square[None]) for square in pixels])
    return torch.cat([encode(part) for part in resized.split(SQUARES_AT_ONCE)])


def squares(pixels: Float[Tensor, "3 height width"], crop: str) -> list[Tensor]:
    """The square parts of a picture that the encoder is to see.

    center: the middle, as adapters are trained. pad: all of it, with grey at the sides. stretch: all
    of it, distorted. tiles: as few squares as cover it, overlapping where they must.

    Raises:
        ImpromptError: there is no such crop.
    """
    if crop not in CROPS:
        raise ImpromptError(f"There is no crop {crop!r}; choose {', '.join(CROPS)}.")
    height, width = pixels.shape[-2:]
    short, long = min(height, width), max(height, width)
    if short == long or crop == "center":
        return [pixels]  # the encoder itself takes the middle
    if crop == "stretch":
        return [functional.interpolate(pixels[None], (long, long), mode="bilinear")[0]]
    if crop == "pad":
        across, down = long - width, long - height
        sides = (across // 2, across - across // 2, down // 2, down - down // 2)
        return [functional.pad(pixels, sides)]
    num_tiles = -(-long // short)
    starts = [round(i * (long - short) / (num_tiles - 1)) for i in range(num_tiles)]
    is_wide = width > height
    return [
        pixels[:, :, start : start + short] if is_wide else pixels[:, start : start + short]
        for start in starts
    ]


def merge_features(
    values: Float[Tensor, "pictures *shape"], merge: str, weights: Sequence[Number] | None
) -> Float[Tensor, "merged *shape"]:
    """Several pictures' features as one prompt's; or, with `each`, as they are, one for each image of a generation.

    concat: all of them, read one beside the other (`weights` multiply each, most of which a projection
    that ends in a normalisation takes back). mean, sum: of the
    weighted features; norm mean: the mean of directions, at the mean length. difference: the first
    minus the mean of the others, which takes away what these show; each is multiplied with its weight
    before, and the mean divides by their number, so that a small weight takes away little.

    Raises:
        ImpromptError: no such merge, or another number of weights than pictures.
    """
    if merge not in MERGES:
        raise ImpromptError(f"There is no merge {merge!r}; choose {', '.join(MERGES)}.")
    if weights is not None and len(weights) != len(values):
        raise ImpromptError(f"{len(weights)} weights were given for {len(values)} images.")
    factors = values.new_tensor([1.0] * len(values) if weights is None else list(weights))
    shaped = factors.view(-1, *[1] * (values.ndim - 1))
    if merge in ("concat", "each"):
        return values * shaped
    if merge == "sum":
        return (values * shaped).sum(0, keepdim=True)
    if merge == "difference":
        if len(values) < 2:
            raise ImpromptError("A difference needs at least two images.")
        weighted = values * shaped
        return weighted[:1] - weighted[1:].mean(0, keepdim=True)
    total = float(factors.sum())
    if total == 0:
        raise ImpromptError("Weights that add up to 0 have no mean: use merge='sum'.")
    if merge == "norm mean":
        lengths = values.norm(dim=-1, keepdim=True)
        mean = (values / lengths.clamp(min=1e-12) * shaped).sum(0, keepdim=True) / total
        return mean * lengths.mean(0, keepdim=True)
    return (values * shaped).sum(0, keepdim=True) / total


def pixels_of_image_like(image: ImageLike) -> Float[Tensor, "3 height width"]:
    """Pixels in [-1, 1] of a file, a PIL image, an array as PIL's, or pixels."""
    check_image_like(image)
    if isinstance(image, numpy.ndarray):
        return image_to_pixels(Image.fromarray(image))
    if isinstance(image, Tensor):
        return image
    return image_to_pixels(open_image(image))


def check_image_like(image: object) -> None:
    """Raise an ImpromptError unless this is something that a picture is given as."""
    is_picture = isinstance(image, numpy.ndarray) and (
        image.dtype == numpy.uint8 and image.ndim == 3 and image.shape[-1] == 3
    )
    if isinstance(image, numpy.ndarray) and not is_picture:
        raise ImpromptError(
            f"An array of shape {image.shape} and {image.dtype} is no picture: (height, width, 3) "
            "of uint8 is needed, or a tensor (3, height, width) in [-1, 1]."
        )
    if not isinstance(image, str | PathLike | Image.Image | Tensor | numpy.ndarray):
        raise ImpromptError(
            f"A picture is given as a file's name, a PIL image, an array or a tensor, not as a "
            f"{type(image).__name__}."
        )
    if isinstance(image, Tensor):
        _check_pixels(image)


def _check_pixels(pixels: Tensor) -> None:
    """Raise an ImpromptError unless these are the pixels of one picture, in [-1, 1] or little beyond."""
    if pixels.ndim != 3 or len(pixels) != 3 or pixels.numel() == 0:
        raise ImpromptError(
            f"A picture has the shape {tuple(pixels.shape)}; pixels are (3, height, width) in [-1, 1]."
        )
    if not pixels.is_floating_point():
        raise ImpromptError(
            f"A picture's pixels are {pixels.dtype}; they must be floating point, in [-1, 1]. Divide "
            "bytes by 127.5 and subtract 1, or give an array (height, width, 3) of uint8."
        )
    low, high = (float(value) for value in pixels.aminmax())
    if not -MAX_PIXEL <= low <= high <= MAX_PIXEL:
        raise ImpromptError(
            f"A picture's pixels go from {low:g} to {high:g}; they must be in [-1, 1]."
        )


def is_features_file(image: object) -> bool:
    """Whether a path names kept features and not a picture."""
    return isinstance(image, str | PathLike) and Path(image).suffix == ".safetensors"
