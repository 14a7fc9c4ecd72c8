"""Maps read off pictures, and how far they are from the maps that were asked for."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from imprompt.core.shipped import shipped
from imprompt.diorama import Render
from imprompt.diorama.maps import depth_map, keypoint_map, keypoints_of_map
from imprompt.diorama.vocabulary import GROUND
from imprompt.encoders.small_network import load_small_network
from imprompt.systems.map_reader import MapReader, MapReading


def load_map_reader(path: Path | None = None) -> MapReader:
    """The map reader that comes with the package, or one trained elsewhere.

    Raises:
        ImpromptError: there is no such file, or it is something else.
    """
    return load_small_network(
        path or shipped("diorama-map-reader.safetensors"),
        lambda weights: MapReader(width=weights["at_full.0.weight"].shape[0]),
        what="map reader",
        hint="`imprompt train map-reader` makes one, and --map-reader names it",
    )


@torch.inference_mode()
def read_maps(reader: MapReader, pixels: Tensor) -> MapReading:
    """What pictures (batch, 3, 64, 64) in [-1, 1] show."""
    parts = [reader(part.clamp(-1, 1)) for part in pixels.split(64)]
    return MapReading(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("depth", "edges", "parts", "keypoints")
        )
    )


def compare(reading: MapReading, asked: Render) -> dict[str, float]:
    """How well what was read off pictures obeys what was asked for.

    depth error: mean difference of the depth maps, in grey levels of 255.
    edge F1: of outlines, where a line one pixel beside another counts as on it.
    segmentation IoU: mean over the parts that were asked for. object IoU: all its parts as one.
    keypoint error: mean distance in pixels, of the points that a keypoint map shows.
    """
    depth = depth_map(asked.depth)[:, 0]
    found_parts = reading.parts.argmax(1)
    size_px = asked.depth.shape[-1]
    points, seen = keypoints_of_map(keypoint_map(asked.keypoints, size_px))
    distance = (reading.keypoints - points).norm(dim=2)
    return {
        "depth error": 255 * (reading.depth - depth).abs().mean().item(),
        "edge F1": edge_f1(reading.edges > 0.5, asked.edges > 0.5),
        "segmentation IoU": part_iou(found_parts, asked.segmentation),
        "object IoU": _iou(found_parts > GROUND, asked.segmentation > GROUND).mean().item(),
        "keypoint error": distance[seen].mean().item(),
    }


def edge_f1(found: Tensor, asked: Tensor) -> float:
    """F1 of lines (batch, height, width) with a tolerance of one pixel, mean over the batch."""
    near_found, near_asked = (_widened(lines) for lines in (found, asked))
    precision = _share(found & near_asked, found)
    recall = _share(asked & near_found, asked)
    return (2 * precision * recall / (precision + recall).clamp(min=1e-9)).mean().item()


def part_iou(found: Tensor, asked: Tensor) -> float:
    """Mean over pictures of the mean over the asked parts of intersection over union."""
    means: list[Tensor] = []
    for one, other in zip(found, asked, strict=True):
        parts = other.unique()
        means.append(torch.stack([_iou((one == p)[None], (other == p)[None])[0] for p in parts]))
    return torch.stack([one.mean() for one in means]).mean().item()


def _iou(found: Tensor, asked: Tensor) -> Tensor:
    both, either = (found & asked).sum((1, 2)), (found | asked).sum((1, 2))
    return both / either.clamp(min=1)


def _widened(lines: Tensor) -> Tensor:
    return functional.max_pool2d(lines[:, None].float(), 3, 1, 1)[:, 0] > 0


def _share(some: Tensor, whole: Tensor) -> Tensor:
    return some.sum((1, 2)) / whole.sum((1, 2)).clamp(min=1)
