"""The judge: a small classifier that says what a diorama picture shows. It is used in evaluation only.

It learns on renders and must work on generated pictures, so training blurs, shifts and adds noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from imprompt.bases import Base
from imprompt.core.config import check_range
from imprompt.core.images import pixels_of_bytes
from imprompt.core.randomness import Randomness
from imprompt.data.rows import Rows
from imprompt.diorama.vocabulary import COLOURS, KINDS, SETTINGS, STYLES
from imprompt.encoders.small_network import convolution, save_small_network
from imprompt.systems.decoded_look import as_if_decoded
from imprompt.systems.protocol import Figures

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "colour": tuple(COLOURS),
    "style": STYLES,
    "setting": SETTINGS,
}


class Judge(nn.Module):
    """Pixels (batch, 3, 64, 64) in [-1, 1] to one tensor of logits per attribute."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.features = nn.Sequential(
            convolution(3, width, 2),
            convolution(width, width, 1),
            convolution(width, 2 * width, 2),
            convolution(2 * width, 2 * width, 1),
            convolution(2 * width, 4 * width, 2),
            convolution(4 * width, 4 * width, 1),
            convolution(4 * width, 4 * width, 2),
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(8 * width, len(classes)) for name, classes in ATTRIBUTES.items()}
        )

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        maps = self.features(pixels)
        pooled = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], 1)
        return {name: head(pooled) for name, head in self.heads.items()}


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """What is trained."""

    width: int = 32
    """Channels of the first layer."""

    def __post_init__(self) -> None:
        check_range(self, ("width",), 1)


def build(options: ClassifierOptions, base: Base, columns: Rows) -> ClassifierSystem:
    """The system for columns of pixels and labels; of the base only where it computes matters."""
    judge: Any = Judge(options.width)
    return ClassifierSystem(judge.to(base.device, memory_format=torch.channels_last))


class ClassifierSystem:
    """Trains the judge on `pixels` (uint8) and `labels` (rows, 4), class numbers as in `ATTRIBUTES`."""

    columns = ("pixels", "labels")
    rows_are_coupled = True  # normalised together

    def __init__(self, module: Judge):
        self.module = module

    def loss(self, batch: dict[str, Tensor], randomness: Randomness) -> tuple[Tensor, Figures]:
        pixels = pixels_of_bytes(batch["pixels"])
        mirrored = randomness.uniform("mirror")[:, None, None, None] < 0.5
        pixels = torch.where(mirrored, pixels.flip(3), pixels)
        pixels = as_if_decoded(pixels, randomness, 0.8)
        logits = self.module(pixels.contiguous(memory_format=torch.channels_last))
        losses = [
            functional.cross_entropy(logits[name].float(), batch["labels"][:, column])
            for column, name in enumerate(ATTRIBUTES)
        ]
        return torch.stack(losses).sum(), {}

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        """The share of pictures that each attribute is read off rightly."""
        logits = self.module(pixels_of_bytes(batch["pixels"]))
        return {
            name: (logits[name].argmax(1) == batch["labels"][:, column]).float().mean().item()
            for column, name in enumerate(ATTRIBUTES)
        }

    def export(self, path: Path) -> None:
        """Write one safetensors file in half precision."""
        save_small_network(self.module, path, "diorama-judge")
