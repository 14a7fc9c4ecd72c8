"""Image files, PIL images and tensors, and the ways between them.

Pixels are float32, RGB, (channels, height, width) or a batch of these, in [-1, 1].
"""

# Strict but for what numpy, Pillow and tqdm leave untyped:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from io import BytesIO
from os import PathLike

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from imprompt.core.errors import ImpromptError

# Larger pictures are refused: decoding one would fill the memory (a "decompression bomb").
MAX_PIXELS = 178_956_970
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
# Of all that Pillow reads, what holds pictures and runs no other program (as Encapsulated PostScript does).
_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# Turning a warning into an error is a setting of the whole process, so one thread at a time.
_OPENING = threading.Lock()


def open_image(
    source: str | PathLike[str] | BytesIO | Image.Image, name: str | None = None
) -> Image.Image:
    """An RGB image from a file (or a PIL image as it is), the way a person sees it.

    `name` is what messages call it; by default the source's own.

    EXIF orientation is applied, palettes, CMYK and 16-bit greys are converted, transparency is laid
    on white, and of an animation the first frame is taken.

    Raises:
        ImpromptError: no such file, no image, cut off, or too large to decode safely.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(ImageOps.exif_transpose(source))
    file, source = source, source if name is None else name
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            image = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise ImpromptError(
                    f"{source} has {image.width} × {image.height} pixels; at most {MAX_PIXELS:,} "
                    "are decoded. Make it smaller."
                )
            image.seek(0)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise ImpromptError(f"There is no image file {source}.") from error
    except IsADirectoryError as error:
        raise ImpromptError(f"{source} is a folder, not an image file.") from error
    except UnidentifiedImageError as error:
        raise ImpromptError(f"{source} is no image that can be read.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImpromptError(f"{source} is too large to decode safely: {error}") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ImpromptError(f"The image {source} is damaged or cut off: {error}.") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.asarray(image, dtype=np.float32)
        if image.mode == "F":
            top = 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
        else:
            top = 65535.0 if values.max(initial=0.0) > 255 else 255.0
        grey = np.clip(values / top * 255.0 + 0.5, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def resize_and_center_crop(image: Image.Image, size_px: int) -> Image.Image:
    """The shortest side to `size_px` (bicubic), then the square in the middle."""
    size, (left, top) = center_crop(image.size, size_px)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size_px, top + size_px))


def center_crop(size: tuple[int, int], size_px: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a picture of (width, height) is resized to, and left and top of the square in its middle.

    Left and top count the pixels of the resized picture.
    """
    ratio = size_px / min(size)
    width, height = (max(size_px, round(side * ratio)) for side in size)
    return (width, height), ((width - size_px) // 2, (height - size_px) // 2)


def image_to_pixels(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """Pixels of an image of any mode, in [-1, 1]."""
    values = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels_of_bytes(values).permute(2, 0, 1).contiguous()


def pixels_to_images(pixels: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Images of pixels; values beyond [-1, 1] are clipped."""
    values = bytes_of_pixels(pixels.detach().cpu()).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(one) for one in values]


def pixels_of_bytes(values: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pixels in [-1, 1], float32, of bytes 0 … 255, whatever the shape."""
    return values.float() / 127.5 - 1.0


def bytes_of_pixels(pixels: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Bytes 0 … 255 of pixels, whatever the shape; values beyond [-1, 1] are clipped."""
    return ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def image_grid(
    images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None
) -> Image.Image:
    """A contact sheet, row by row; cells are as large as the largest image, labels below them.

    Raises:
        ImpromptError: no images, or not one label for each.
    """
    if not images or columns < 1:
        raise ImpromptError(f"A grid of {len(images)} images in {columns} columns cannot be drawn.")
    if labels is not None and len(labels) != len(images):
        raise ImpromptError(f"{len(labels)} labels were given for {len(images)} images.")
    width, height = max(i.width for i in images), max(i.height for i in images)
    label_height = 0 if labels is None else 14
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + label_height)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left, top = index % columns * width, index // columns * (height + label_height)
        sheet.paste(image, (left, top))
        if labels is not None:
            draw.text((left + 2, top + height + 1), labels[index], fill="black")
    return sheet
