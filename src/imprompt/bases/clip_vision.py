"""The image encoder that a base brings along: pixels to what an image-prompt adapter reads."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.bases.turns import working_device

# The channel statistics of CLIP's training images, which all CLIP encoders share, in [0, 1], RGB.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STANDARD_DEVIATION = (0.26862954, 0.26130258, 0.27577711)

MAX_SIGNS_PER_PARAMETER = 1024


class ClipImageEncoder(nn.Module):
    """A frozen CLIP vision tower that takes pixels as everything else here does.

    It resizes the shorter side to its own size (bicubic, antialiased), crops the centre and
    normalises; all of it in batched torch, without gradients.

    Source: Radford et al. (2103.00020); the two kinds of features: IP-Adapter (2308.06721) section
    3.2 (image embedding) and its Plus variant (penultimate states).
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float] = CLIP_MEAN,
        standard_deviation: Sequence[float] = CLIP_STANDARD_DEVIATION,
    ):
        """`model` is a transformers `CLIPVisionModelWithProjection`."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.mean = tuple(mean)
        self.standard_deviation = tuple(standard_deviation)

    @property
    def config(self) -> Any:
        """Its model's configuration, a `CLIPVisionConfig`."""
        return self.model.config

    @property
    def image_size_px(self) -> int:
        """The side of the square its model looks at."""
        return self.config.image_size

    @property
    def embed_dim(self) -> int:
        """Width of `embeds`."""
        return self.config.projection_dim

    @property
    def hidden_dim(self) -> int:
        """Width of `hidden_states`."""
        return self.config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return working_device(self.model)

    @torch.no_grad()
    def resized(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 size size"]:
        """What it looks at of pixels of any size: the square in the middle, float32, in [-1, 1]."""
        # Resizing runs in float32: half precision has no antialiased kernel on every device.
        pixels = pixels.to(device=self.device, dtype=torch.float32)
        return _resize_and_center_crop(pixels, self.image_size_px)

    @torch.no_grad()
    def normalized(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 size size"]:
        """The model's input for pixels in [-1, 1] of any size."""
        return self._normalized(self.resized(pixels))

    @torch.no_grad()
    def embeds(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """One vector for each image, projected into the space that CLIP shares with text."""
        return self.model(self.normalized(pixels)).image_embeds

    @torch.no_grad()
    def hidden_states(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch length dim"]:
        """The penultimate layer's states: class token first, then the patches row by row."""
        return self._penultimate(self.normalized(pixels))

    def read(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch length dim"]:
        """`hidden_states`, through which gradients pass, of pixels that may leave [-1, 1]."""
        pixels = pixels.to(device=self.device, dtype=torch.float32).clamp(-1, 1)
        square = _resize_and_center_crop(pixels, self.image_size_px)
        return self._penultimate(self._normalized(square))

    def zero_hidden_states(self) -> Float[Tensor, "1 length dim"]:
        """What stands for "no image": the states of an all-zero, already normalised image."""
        return self._zero_hidden_states.to(device=self.device, dtype=self.dtype)

    def fingerprint(self) -> str:
        """Tells this encoder from every other: 16 hexadecimal digits."""
        return fingerprint_of({"image_encoder": self.model})

    @cached_property
    def _zero_hidden_states(self) -> Tensor:
        size = self.image_size_px
        zeros = torch.zeros(1, 3, size, size, device=self.device, dtype=self.dtype)
        # Even if first asked for in inference mode, it must be of use to training afterwards.
        with torch.inference_mode(False), torch.no_grad():
            return self._penultimate(zeros)

    def _normalized(self, pixels: Tensor) -> Tensor:
        mean = pixels.new_tensor(self.mean)[:, None, None]
        standard_deviation = pixels.new_tensor(self.standard_deviation)[:, None, None]
        return (((pixels + 1) / 2 - mean) / standard_deviation).to(self.dtype)

    def _penultimate(self, normalized: Tensor) -> Tensor:
        """What goes into the last layer.

        Asked for all hidden states, transformers would leave hooks in the model for good, with
        which it cannot be sent to another process.
        """
        states: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append(args[0] if args else kwargs["hidden_states"])

        model: Any = self.model
        last: nn.Module = model.vision_model.encoder.layers[-1]
        hook = last.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self.model(normalized)
        finally:
            hook.remove()
        return states[0]


def _resize_and_center_crop(pixels: Tensor, size_px: int) -> Tensor:
    height, width = pixels.shape[-2:]
    if (height, width) == (size_px, size_px):
        return pixels
    ratio = size_px / min(height, width)
    resized = (max(size_px, int(height * ratio)), max(size_px, int(width * ratio)))
    if resized != (height, width):
        pixels = functional.interpolate(pixels, size=resized, mode="bicubic", antialias=True)
        # Bicubic weights overshoot at edges; an image file would have been clipped here.
        pixels = pixels.clamp(-1, 1)
    top, left = (resized[0] - size_px) // 2, (resized[1] - size_px) // 2
    return pixels[..., top : top + size_px, left : left + size_px]


def fingerprint_of(parts: dict[str, nn.Module]) -> str:
    """A short hash of networks: names and shapes of their parameters, and signs of their values.

    Signs, for they survive every rounding: the same weights have the same fingerprint in whichever
    precision they were stored and loaded, and other weights have other signs.
    """
    digest = hashlib.sha256()
    for part_name in sorted(parts):
        signs: list[Tensor] = []
        for name, parameter in parts[part_name].named_parameters():
            digest.update(f"{part_name}.{name} {tuple(parameter.shape)}\n".encode())
            # Vectors are biases and norms, which are alike (zeros and ones) in many models.
            if parameter.ndim > 1:
                signs.append(parameter.detach().flatten()[:MAX_SIGNS_PER_PARAMETER].signbit())
        digest.update(torch.cat(signs).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
