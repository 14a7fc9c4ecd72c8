"""Masks: where in the picture something acts."""

import numpy
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from imprompt.core.errors import ImpromptError
from imprompt.core.images import open_image
from imprompt.generation.features import ImageLike


def mask_to_tensor(mask: ImageLike) -> Float[Tensor, "height width"]:
    """Where something acts, in [0, 1]: of a file or PIL image its brightness."""
    if isinstance(mask, numpy.ndarray) and mask.ndim == 2:
        # Zeros and ones are a mask in every type; as brightness of a picture all would be black.
        is_brightness = mask.dtype == numpy.uint8 and mask.max(initial=0) > 1
        mask = Image.fromarray(mask) if is_brightness else torch.from_numpy(mask)
    if isinstance(mask, Tensor):
        if mask.ndim != 2:
            raise ImpromptError(
                f"A mask has the shape {tuple(mask.shape)}; (height, width) in [0, 1] is needed."
            )
        return mask.to(torch.float32)
    if isinstance(mask, numpy.ndarray):
        mask = Image.fromarray(mask)
    return torch.from_numpy(numpy.asarray(open_image(mask).convert("L"), dtype=numpy.float32) / 255)
