"""How alike a picture is to other pictures and to texts, by the base's own CLIP encoders.

A base folder holds the text encoder without its last projection into the space shared with pictures
(a denoiser does not need it). It is found again by least squares on renders and their captions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from imprompt.bases import Base, image_encoder_of
from imprompt.diorama import caption, render, sample_scene
from imprompt.diorama.held_out import UNSEEN_SCENES
from imprompt.encoders.instruction import instruction_states
from imprompt.systems.warm_start import ridge_regression

FIRST_SCENE = 800_000
NUM_SCENES = 384
CLIP_SCORE_WEIGHT = 2.5
PHRASINGS = 3  # of each scene, for the projection


class ClipScores:
    """Cosine similarities in the space of the base's image encoder, in [-1, 1]."""

    @torch.no_grad()
    def __init__(self, base: Base, num_scenes: int = NUM_SCENES) -> None:
        self.base = base
        scenes = [sample_scene(UNSEEN_SCENES[FIRST_SCENE + i]) for i in range(num_scenes)]
        pixels = torch.cat([render(scenes[i : i + 64]).pixels for i in range(0, num_scenes, 64)])
        images = self.of_images(pixels).repeat(PHRASINGS, 1)
        texts = [caption(scene, i) for i in range(PHRASINGS) for scene in scenes]
        self._weight, self._bias = ridge_regression(self._pooled(texts), images)

    def _pooled(self, texts: Sequence[str]) -> Tensor:
        return instruction_states(self.base, list(texts), "pooled")[:, 0].float().cpu()

    @torch.no_grad()
    def of_images(self, pixels: Tensor) -> Tensor:
        """Directions of pictures (batch, 3, height, width) in [-1, 1]: (batch, dim)."""
        encoder = image_encoder_of(self.base)
        parts = [encoder.embeds(part) for part in pixels.split(64)]
        return functional.normalize(torch.cat(parts).float().cpu(), dim=1)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Directions of texts: (batch, dim)."""
        return functional.normalize(self._pooled(texts) @ self._weight + self._bias, dim=1)


def mean_cosine(first: Tensor, second: Tensor) -> float:
    """Mean of the similarities, row by row."""
    return (first * second).sum(1).mean().item()


def mean_clip_score(images: Tensor, texts: Tensor) -> float:
    """CLIPScore of images with their texts, directions (n, dim) both, in [0, 2.5]: the mean of 2.5 · max(cosine, 0).

    Source: Hessel et al. (2104.08718), equation 1.
    """
    return (CLIP_SCORE_WEIGHT * (images * texts).sum(1).clamp(min=0)).mean().item()
