"""An adapter on pictures of one's own: how near what is drawn is to the picture, and to its caption.

The measure of IP-Adapter's table 1 (2308.06721, section 4.2), with CLIP-I and CLIP-T as defined there; and beside
it what becomes of text and image together, for several λ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from imprompt.adapters import ImagePromptAdapter
from imprompt.bases import Base
from imprompt.core.errors import ImpromptError
from imprompt.core.files import disk_errors
from imprompt.core.images import image_grid, image_to_pixels, pixels_to_images
from imprompt.core.progress import say
from imprompt.data.filters import Unusable
from imprompt.data.pairs import draw as drawn_pixels
from imprompt.data.pairs import load
from imprompt.data.sources import open_source
from imprompt.evaluation.clip_scores import mean_clip_score, mean_cosine
from imprompt.evaluation.measure import Sampling
from imprompt.generation import ImagePrompt, generate

SHOWN = 8  # pairs in the sheet


@runtime_checkable  # for the type checks of the tests
class Clip(Protocol):
    """What sees pictures and texts in one space."""

    def of_images(self, pixels: Tensor) -> Tensor:
        """Directions of pictures (batch, 3, height, width) in [-1, 1]: (batch, dim)."""
        ...

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Directions of texts: (batch, dim)."""
        ...


@dataclass(frozen=True)
class Shown:
    """Pictures to be drawn from, (pictures, 3, side, side) in [-1, 1], and what their captions say."""

    pixels: Tensor
    captions: list[str]


def last_pairs(source: str, count: int, size_px: int) -> Shown:
    """The last pairs of a source that can be used, as a training on it holds some out; pictures as it cuts them.

    Raises:
        ImpromptError: no such source, or nothing in it can be used.
    """
    pictures: list[object] = []
    captions: list[str] = []
    fault = "it is empty"
    # Part by part, for to list one that is not needed may take a while.
    backwards = (pair for part in reversed(open_source(source)) for pair in reversed(part.pairs()))
    for pair in backwards:
        try:
            loaded = load(pair, size_px)
        except Unusable as error:
            fault = f"{pair.name}: {error}"
            continue
        pictures.append(loaded.picture)
        captions.append(loaded.caption)
        if len(pictures) == count:
            break
    if not pictures:
        raise ImpromptError(f"No pair of {source} can be used; {fault}.")
    if len(pictures) < count:
        say(f"{source} has {len(pictures)} pairs that can be used; all of them are measured")
    return Shown(drawn_pixels(pictures[::-1], size_px)[0], captions[::-1])


def measure_pictures(
    base: Base,
    adapter: ImagePromptAdapter,
    clip: Clip,
    shown: Shown,
    sampling: Sampling,
    scales: Sequence[float],
    *,
    image_scale: float = 1.0,
) -> tuple[dict[str, float], Image.Image]:
    """CLIP-I and CLIP-T of each way to draw, and a sheet of some pictures.

    Drawn are: each picture alone, at `image_scale`; and each with its caption as text, for each λ of `scales`
    (0 is the text alone). CLIP-I is the cosine to the picture, in [-1, 1], CLIP-T the CLIPScore with its caption,
    in [0, 2.5].
    """
    pictures, texts = clip.of_images(shown.pixels), clip.of_texts(shown.captions)
    figures = {"the pictures themselves: CLIP-T": mean_clip_score(pictures, texts)}
    rows = [("picture", pixels_to_images(shown.pixels[:SHOWN]))]
    ways: list[tuple[str, Sequence[str], float]] = [
        (f"image alone, λ={image_scale:g}", [""] * len(pictures), image_scale),
        *((f"image and caption, λ={scale:g}", shown.captions, scale) for scale in scales),
    ]
    for name, prompts, scale in ways:
        say(name)
        prompt = ImagePrompt(list(shown.pixels), adapter=adapter, merge="each", scale=scale)
        images = generate(
            base,
            list(prompts),
            prompt,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            sampler=sampling.sampler,
            seed=sampling.seed,
        )
        drawn = clip.of_images(torch.stack([image_to_pixels(image) for image in images]))
        figures[f"{name}: CLIP-I"] = mean_cosine(drawn, pictures)
        figures[f"{name}: CLIP-T"] = mean_clip_score(drawn, texts)
        rows.append((name, images[:SHOWN]))
    columns = len(rows[0][1])
    cells = [image for _, images in rows for image in images]
    # The font of the labels knows no λ.
    titles = [name.replace("λ=", "scale ") for name, _ in rows]
    labels = [title if i == 0 else "" for title in titles for i in range(columns)]
    return figures, image_grid(cells, columns, labels)


def evaluate_pictures(
    base: Base,
    adapter: ImagePromptAdapter,
    load_clip: Callable[[], Clip],
    source: str,
    sampling: Sampling,
    output: Path,
    count: int,
    scales: Sequence[float],
    image_scale: float,
) -> dict[str, float]:
    """Measure a source's last pairs; the sheet goes to OUTPUT/pictures.png."""
    shown = last_pairs(source, count, base.image_size_px)
    figures, sheet = measure_pictures(
        base, adapter, load_clip(), shown, sampling, scales, image_scale=image_scale
    )
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        sheet.save(output / "pictures.png")
    say(f"pictures: {output / 'pictures.png'}")
    return figures
