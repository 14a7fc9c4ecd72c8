"""The map reader: a small network that reads depth, edges, segmentation and keypoints off a picture.

It learns on renders and is used in evaluation only, to see whether a generated picture obeys the map
that was asked for.
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
from imprompt.diorama.maps import KEYPOINT_COLOURS, PART_COLOURS, keypoints_of_map, parts_of_map
from imprompt.encoders.small_network import convolution, save_small_network
from imprompt.systems.decoded_look import as_if_decoded
from imprompt.systems.protocol import Figures

_NUM_PARTS, _NUM_KEYPOINTS = len(PART_COLOURS), len(KEYPOINT_COLOURS)


@dataclass(frozen=True)
class MapReading:
    """What a picture shows.

    depth, edges: (batch, height, width), as in a control map, in [0, 1].
    parts: (batch, parts, height, width), logits. keypoints: (batch, 5, 2), pixel coordinates.
    """

    depth: Tensor
    edges: Tensor
    parts: Tensor
    keypoints: Tensor


class MapReader(nn.Module):
    """Pixels (batch, 3, 64, 64) in [-1, 1] to a `MapReading`, by a small U-shaped network."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.at_full = convolution(3, width)
        self.at_half = nn.Sequential(
            convolution(width, 2 * width, 2), convolution(2 * width, 2 * width)
        )
        self.at_quarter = nn.Sequential(
            convolution(2 * width, 4 * width, 2), convolution(4 * width, 4 * width)
        )
        self.at_eighth = nn.Sequential(
            convolution(4 * width, 6 * width, 2), convolution(6 * width, 6 * width)
        )
        self.whole = nn.Linear(6 * width, 6 * width)
        self.to_quarter = convolution(10 * width, 4 * width)
        self.to_half = convolution(6 * width, 2 * width)
        self.narrow = nn.Conv2d(2 * width, width, 1)
        self.to_full = convolution(2 * width, width)
        self.maps = nn.Conv2d(width, 2 + _NUM_PARTS, 1)
        self.heat = nn.Conv2d(2 * width, _NUM_KEYPOINTS, 1)

    def forward(self, pixels: Tensor) -> MapReading:
        full = self.at_full(pixels)
        half = self.at_half(full)
        quarter = self.at_quarter(half)
        eighth = self.at_eighth(quarter)
        eighth = eighth + self.whole(eighth.mean((2, 3)))[:, :, None, None]
        quarter = self.to_quarter(torch.cat([_twice(eighth), quarter], 1))
        half = self.to_half(torch.cat([_twice(quarter), half], 1))
        full = self.to_full(torch.cat([_twice(self.narrow(half)), full], 1))
        maps = self.maps(full).float()
        heat = self.heat(half).float().flatten(2).softmax(2).unflatten(2, half.shape[2:])
        return MapReading(
            maps[:, 0].sigmoid(), maps[:, 1].sigmoid(), maps[:, 2:], 2 * _centre_of(heat)
        )


def _twice(features: Tensor) -> Tensor:
    return functional.interpolate(features, scale_factor=2.0, mode="nearest")


def _centre_of(heat: Tensor) -> Tensor:
    """Means (batch, points, 2) of heat maps (batch, points, h, w) that each sum to one."""
    axis = torch.arange(heat.shape[-1], device=heat.device) + 0.5
    x = (heat.sum(2) * axis).sum(2)
    y = (heat.sum(3) * axis).sum(2)
    return torch.stack([x, y], 2)


@dataclass(frozen=True, kw_only=True)
class MapReaderOptions:
    """What is trained."""

    width: int = 16
    """Channels of the first layer."""

    def __post_init__(self) -> None:
        check_range(self, ("width",), 1)


def build(options: MapReaderOptions, base: Base, columns: Rows) -> MapReaderSystem:
    """The system for columns of pixels and all control maps; of the base only where it computes matters."""
    reader: Any = MapReader(options.width)
    return MapReaderSystem(reader.to(base.device, memory_format=torch.channels_last))


class MapReaderSystem:
    """Trains the reader on `pixels` (uint8) and the control maps of the same scenes."""

    columns = (
        "pixels",
        "control_depth",
        "control_edges",
        "control_segmentation",
        "control_keypoints",
    )
    rows_are_coupled = True  # normalised together

    def __init__(self, module: MapReader):
        self.module = module

    def loss(self, batch: dict[str, Tensor], randomness: Randomness) -> tuple[Tensor, Figures]:
        pixels = pixels_of_bytes(batch["pixels"])
        pixels = as_if_decoded(pixels, randomness, 0.9)
        reading = self.module(pixels.contiguous(memory_format=torch.channels_last))
        losses = _losses(reading, batch)
        return torch.stack(list(losses.values())).sum(), {k: v.detach() for k, v in losses.items()}

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        reading = self.module(pixels_of_bytes(batch["pixels"]))
        return {name: value.item() for name, value in _losses(reading, batch).items()}

    def export(self, path: Path) -> None:
        """Write one safetensors file in half precision."""
        save_small_network(self.module, path, "map-reader")


def _losses(reading: MapReading, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    depth = batch["control_depth"][:, 0].float() / 255
    edges = batch["control_edges"][:, 0].float() / 255
    parts = parts_of_map(batch["control_segmentation"].float() / 255)
    keypoints, seen = keypoints_of_map(batch["control_keypoints"].float() / 255)
    distance = (reading.keypoints - keypoints).square().sum(2).add(1e-3).sqrt()
    line_weight = 1 + 3 * edges
    return {
        "depth": 5 * (reading.depth - depth).abs().mean(),
        "edges": (line_weight * (reading.edges - edges).abs()).mean(),
        "parts": functional.cross_entropy(reading.parts, parts, label_smoothing=0.01),
        "keypoints": 0.1 * (distance * seen).sum() / seen.sum().clamp(min=1),
    }
