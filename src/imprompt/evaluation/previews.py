"""Pictures of what a training has learned, drawn with fixed seeds at every validation.

Above stands what a control was shown (a map, landmarks), then the held-out picture, below it what is drawn
or, by an autoencoder, decoded again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from imprompt.adapters import ImagePromptAdapter
from imprompt.bases import Base
from imprompt.bases.latent_space import pixels_per_latent
from imprompt.core.images import image_grid, pixels_of_bytes, pixels_to_images
from imprompt.data.rows import Rows
from imprompt.encoders.landmarks import landmark_images
from imprompt.evaluation.measure import Sampling, draw
from imprompt.generation.conditions import TokenPrompt
from imprompt.generation.controls import MapControl
from imprompt.systems.autoencoder import AutoencoderSystem
from imprompt.systems.control import ControlSystem
from imprompt.systems.identity import IdentitySystem
from imprompt.systems.image_prompt import ImagePromptSystem
from imprompt.systems.instruct import InstructSystem
from imprompt.systems.protocol import System

PREVIEW = Sampling(steps=20, seed=0)

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the pictures of a preview are made of."""

    texts: Sequence[str] | Tensor
    """One for each picture, or their token ids."""
    tokens: Tensor | None = None
    """(pictures, tokens, dim), of the adapter that is trained, if one is."""
    zero_tokens: Tensor | None = None
    controls: Sequence[MapControl] = ()


def preview_of(
    system: System, base: Base, data: Rows, num_images: int
) -> Callable[[], Image.Image] | None:
    """What draws the last rows of the data, as many as `num_images`, as the system has learned to.

    None for systems that have nothing to draw, or where no picture is wanted.
    """
    if num_images < 1:
        return None
    held_out: Batch = {}

    def rows() -> Batch:
        if not held_out:
            last = range(max(0, len(data) - num_images), len(data))
            read = data.rows(last, system.columns)
            held_out.update({name: values.to(base.device) for name, values in read.items()})
        return held_out

    if isinstance(system, AutoencoderSystem):
        return lambda: _reconstructions(system, rows())
    ask, adapter = _asking(system, base)
    if ask is None:
        return None
    return lambda: _as_asked(base, ask, adapter, rows())


@torch.inference_mode()
def _reconstructions(system: AutoencoderSystem, rows: Batch) -> Image.Image:
    pixels = pixels_of_bytes(rows["pixels"])
    pictures = torch.cat([pixels, system.reconstructed(pixels).clamp(-1, 1)])
    return image_grid(pixels_to_images(pictures), columns=len(pixels))


@torch.inference_mode()
def _as_asked(
    base: Base, ask: Callable[[Batch], Asked], adapter: ImagePromptAdapter | None, rows: Batch
) -> Image.Image:
    asked = ask(rows)
    made = _drawn(base, asked, adapter, _size_px(base, rows))
    latents = rows["latent_mean"].to(base.dtype) * float(base.vae.config.scaling_factor)
    pictures = base.decode_image(latents).float().clamp(-1, 1).cpu()
    shown = [control.maps.expand(-1, 3, -1, -1).cpu() * 2 - 1 for control in asked.controls]
    return image_grid(pixels_to_images(torch.cat([*shown, pictures, made])), columns=len(made))


def _asking(
    system: System, base: Base
) -> tuple[Callable[[Batch], Asked] | None, ImagePromptAdapter | None]:
    """How held-out rows are asked for, and the adapter that is to be heard.

    Image prompts are drawn from the image alone, all else from everything it was trained on.
    """
    module = system.module
    if isinstance(system, InstructSystem) and isinstance(module, ImagePromptAdapter):
        return lambda rows: _of_instruct(system, rows), module
    if isinstance(system, ControlSystem):
        return lambda rows: _of_control(system, rows), None
    if isinstance(system, IdentitySystem):
        return lambda rows: _of_identity(system, base, rows), system.adapter
    if isinstance(system, ImagePromptSystem) and isinstance(module, ImagePromptAdapter):
        return lambda rows: _of_image_prompt(system, rows), module
    return None, None


def _of_image_prompt(system: ImagePromptSystem, rows: Batch) -> Asked:
    features = [rows[name].float() for name in system.dropped_features]
    return Asked(
        texts=[""] * len(features[0]),
        tokens=system.module.tokens(*features),
        zero_tokens=system.module.tokens(*system.dropped_features.values()),
    )


def _of_instruct(system: InstructSystem, rows: Batch) -> Asked:
    def tokens(batch: Batch) -> Tensor:
        return system.tokens(batch, system.base.encode_text(batch["text_ids"]))

    return Asked(
        texts=rows["text_ids"],
        tokens=tokens(rows),
        zero_tokens=tokens(system.nothing(rows))[:1],
    )


def _of_control(system: ControlSystem, rows: Batch) -> Asked:
    control = MapControl(module=system.module, maps=system.maps(rows))
    return Asked(texts=rows["text_ids"], controls=[control])


def _of_identity(system: IdentitySystem, base: Base, rows: Batch) -> Asked:
    adapter, faces = system.adapter, system.faces(rows)
    tokens, zero_tokens = adapter.tokens(faces), adapter.tokens(torch.zeros_like(faces[:1]))
    control = MapControl(
        module=system.net,
        maps=landmark_images(rows["landmarks"], *_size_px(base, rows)),
        tokens=tokens,
        zero_tokens=zero_tokens,
    )
    return Asked(texts=rows["text_ids"], tokens=tokens, zero_tokens=zero_tokens, controls=[control])


def _size_px(base: Base, rows: Batch) -> tuple[int, int]:
    """Height and width of the data's pictures, which need not be those that the base was made for."""
    factor = pixels_per_latent(base.vae)
    height, width = rows["latent_mean"].shape[-2:]
    return height * factor, width * factor


def _drawn(
    base: Base, asked: Asked, adapter: ImagePromptAdapter | None, size_px: tuple[int, int]
) -> Tensor:
    """Pixels of what is asked for."""

    def made(prompts: Sequence[TokenPrompt]) -> Tensor:
        return draw(
            base,
            asked.texts,
            prompts,
            PREVIEW,
            controls=asked.controls,
            size_px=size_px,
            show_progress=False,
        )

    if adapter is None or asked.tokens is None or asked.zero_tokens is None:
        return made(())
    with adapter.install(base.unet) as handle:
        prompt = TokenPrompt(handle=handle, tokens=asked.tokens, zero_tokens=asked.zero_tokens)
        return made([prompt])
