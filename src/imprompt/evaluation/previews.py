"""Pictures of what a training has learned, drawn with fixed seeds at every validation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image

from imprompt.bases import Base
from imprompt.core.images import image_grid, pixels_to_images
from imprompt.data.rows import Rows
from imprompt.evaluation.measure import Sampling, draw
from imprompt.generation.conditions import TokenPrompt
from imprompt.systems.image_prompt import ImagePromptSystem
from imprompt.systems.protocol import System

PREVIEW = Sampling(steps=20, guidance_scale=4.0, seed=0)


def set_up_previews(system: System, base: Base, data: Rows, num_images: int) -> None:
    """Let an image-prompt system draw: the last rows' pictures, and below each one made of its features alone.

    Other systems say themselves what they draw, if anything.
    """
    from imprompt.adapters import ImagePromptAdapter

    if (
        num_images < 1
        or type(system) is not ImagePromptSystem
        or not isinstance(system.module, ImagePromptAdapter)
        or system.draw is not None
    ):
        return
    system.draw = _drawer(system, base, data, num_images)


def _drawer(
    system: ImagePromptSystem, base: Base, data: Rows, num_images: int
) -> Callable[[], Image.Image]:
    held_out: dict[str, torch.Tensor] = {}

    def made() -> Image.Image:
        if not held_out:
            rows = range(max(0, len(data) - num_images), len(data))
            held_out.update(data.rows(rows, system.columns))
        adapter, dropped = system.module, system.dropped_features
        count = len(held_out["latent_mean"])
        with adapter.install(base.unet) as handle, torch.inference_mode():
            tokens = adapter.tokens(*(held_out[n].to(base.device).float() for n in dropped))
            zero_tokens = adapter.tokens(*dropped.values())
            prompt = TokenPrompt(handle=handle, tokens=tokens, zero_tokens=zero_tokens, scale=1.0)
            drawn = draw(base, [""] * count, [prompt], PREVIEW, show_progress=False)
            scale = float(base.vae.config.scaling_factor)
            latents = held_out["latent_mean"].to(base.device, base.dtype) * scale
            pictures = base.decode_image(latents).float().clamp(-1, 1).cpu()
        return image_grid(pixels_to_images(torch.cat([pictures, drawn])), columns=count)

    return made
