"""Measurements on the embedded world: how well base and adapter do what they are asked.

All scenes come from seeds that no training sees (`diorama.held_out`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imprompt.adapters import Handle, ImagePromptAdapter
from imprompt.adapters.site_presets import preset_scales
from imprompt.adapters.sites import Scale
from imprompt.bases import Base, image_encoder_of
from imprompt.diorama import OBJECT_KINDS, Scene, caption, render, sample_scene
from imprompt.diorama.held_out import UNSEEN_SCENES
from imprompt.evaluation.judge import read, shares, truth
from imprompt.generation.conditions import TokenPrompt
from imprompt.generation.controls import MapControl
from imprompt.generation.sampler import sample_latents
from imprompt.systems.classifier import ATTRIBUTES, Judge

FIRST_OF_JUDGE = 500_000


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are drawn for a measurement."""

    steps: int = 50
    guidance_scale: float | None = None
    """None is the base's own."""
    sampler: str = "ddim"
    seed: int = 0

    def guidance(self, base: Base) -> float:
        """The guidance scale to draw with."""
        return base.guidance_scale if self.guidance_scale is None else self.guidance_scale


def unseen_scenes(count: int, first: int = 0) -> list[Scene]:
    """Scenes of objects (persons have no object kind to be asked for), every kind as often."""
    return [
        sample_scene(UNSEEN_SCENES[first + i], kind=OBJECT_KINDS[i % len(OBJECT_KINDS)])
        for i in range(count)
    ]


def draw(
    base: Base,
    texts: Sequence[str] | Tensor,
    prompts: Sequence[TokenPrompt],
    sampling: Sampling,
    *,
    show_progress: bool = True,
    controls: Sequence[MapControl] = (),
    size_px: int | tuple[int, int] | None = None,
) -> Tensor:
    """Pixels (images, 3, height, width) in [-1, 1] for texts (or their token ids), ready token prompts
    and controls. `size_px` is a square's side or (height, width), by default the base's own."""
    with torch.inference_mode():
        latents = sample_latents(
            base,
            base.encode_text(texts if isinstance(texts, Tensor) else list(texts)),
            base.encode_text([None]),
            prompts,
            steps=sampling.steps,
            guidance_scale=sampling.guidance(base),
            sampler=sampling.sampler,
            seed=sampling.seed,
            size_px=size_px,
            show_progress=show_progress,
            controls=controls,
        )
    return decoded(base, latents)


def decoded(base: Base, latents: Tensor) -> Tensor:
    """Pixels (images, 3, height, width) in [-1, 1] of latents, on the CPU in float32."""
    with torch.inference_mode():
        pixels = torch.cat([base.decode_image(part) for part in latents.split(16)])
    return pixels.float().clamp(-1, 1).cpu()


def prompt_of_pictures(
    base: Base,
    adapter: ImagePromptAdapter,
    handle: Handle,
    pixels: Tensor,
    scale: Scale = 1.0,
) -> TokenPrompt:
    """Each picture (pictures, 3, height, width) in [-1, 1] as the image prompt of one generation.

    Raises:
        ImpromptError: the base has no image encoder.
    """
    encoder = image_encoder_of(base)
    if adapter.variant == "base":
        features = encoder.embeds(pixels)
        nothing = torch.zeros_like(features[:1])
    else:
        features, nothing = encoder.hidden_states(pixels), encoder.zero_hidden_states()
    return TokenPrompt(
        handle=handle,
        tokens=adapter.tokens(features).detach(),
        zero_tokens=adapter.tokens(nothing).detach(),
        scale=scale,
    )


def measure_judge(judge: Judge, count: int = 1000) -> dict[str, float]:
    """How often the judge is right on unseen renders."""
    scenes = [sample_scene(UNSEEN_SCENES[FIRST_OF_JUDGE + i]) for i in range(count)]
    pixels = torch.cat([render(scenes[i : i + 100]).pixels for i in range(0, count, 100)])
    return shares(read(judge, pixels), truth(scenes))


def measure_base(
    base: Base, judge: Judge, sampling: Sampling, count: int = 500
) -> dict[str, float]:
    """The share of generated images that show what the caption asked for."""
    scenes = unseen_scenes(count)
    texts = [caption(scene, i % 5) for i, scene in enumerate(scenes)]
    return shares(read(judge, draw(base, texts, (), sampling)), truth(scenes))


@dataclass(frozen=True)
class ImagePromptResult:
    """Image prompts, what was made of them, and the shares that were kept."""

    scenes: list[Scene]
    references: Tensor
    images: Tensor
    kept: dict[str, float]


def measure_adapter(
    base: Base,
    adapter: ImagePromptAdapter,
    judge: Judge,
    sampling: Sampling,
    count: int = 96,
    scale: float = 1.0,
) -> ImagePromptResult:
    """Image prompts alone (empty text): how much of the reference is kept."""
    scenes = unseen_scenes(count, first=10_000)
    references = render(scenes, base.image_size_px).pixels
    with adapter.install(base.unet) as handle:
        prompt = prompt_of_pictures(base, adapter, handle, references, scale)
        images = draw(base, [""] * count, [prompt], sampling)
    return ImagePromptResult(scenes, references, images, shares(read(judge, images), truth(scenes)))


@dataclass(frozen=True)
class SweepPoint:
    """One λ of a sweep of image and text together.

    follows_text: the object is the text's. follows_image: style and colour are the reference's.
    follows_both: all three at once.
    """

    scale: float
    follows_text: float
    follows_image: float
    follows_both: float
    images: Tensor


def measure_text_and_image(
    base: Base,
    adapter: ImagePromptAdapter,
    judge: Judge,
    sampling: Sampling,
    count: int = 60,
    scales: Sequence[float] = (0.0, 0.5, 1.0),
    site_preset: str | None = None,
) -> tuple[list[Scene], Tensor, list[SweepPoint]]:
    """The image prompt gives style and colour, the text names another object; over λ.

    λ is the same at all sites, or spread over them by a preset.
    """
    scenes = unseen_scenes(count, first=20_000)
    references = render(scenes, base.image_size_px).pixels
    others = [
        replace(scene, kind=OBJECT_KINDS[(OBJECT_KINDS.index(scene.kind) + 5) % len(OBJECT_KINDS)])
        for scene in scenes
    ]
    wanted = truth(others)
    points: list[SweepPoint] = []
    with adapter.install(base.unet) as handle:
        prompt = prompt_of_pictures(base, adapter, handle, references)
        cross_sites = [site for site in handle.sites if site.is_cross]
        for scale in scales:
            spread = preset_scales(site_preset, cross_sites, scale) if site_preset else scale
            texts = [f"a {scene.kind}" for scene in others]
            images = draw(base, texts, [replace(prompt, scale=spread)], sampling)
            found = read(judge, images)
            right = {name: found[name] == wanted[name] for name in ATTRIBUTES}
            image_like = right["style"] & right["colour"]
            points.append(
                SweepPoint(
                    scale,
                    right["kind"].float().mean().item(),
                    image_like.float().mean().item(),
                    (right["kind"] & image_like).float().mean().item(),
                    images,
                )
            )
    return scenes, references, points
