"""Scenes to pictures with their ground truth."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from imprompt.core.errors import ImpromptError
from imprompt.diorama.painting import canvas_of, outlines
from imprompt.diorama.scene import Scene
from imprompt.diorama.styles import STYLE_PAINTERS
from imprompt.diorama.tracing import Surfaces, keypoints_of, trace

_SUPERSAMPLING = 2
# What of a scene decides nothing about its shapes and shadows; the same values for all.
_PAINT: dict[str, Any] = {
    "seed": 0,
    "colour": "red",
    "style": "clay",
    "setting": "studio",
    "placement": "center",
    "size": "small",
    "camera": "low",
}


@dataclass
class Render:
    """A batch of pictures and what is true about them.

    pixels: (batch, 3, size, size), RGB in [-1, 1].
    depth: (batch, size, size), distance along the ray in world units, 30 for the sky.
    normals: (batch, 3, size, size), unit vectors in camera axes (x right, y up, z to the viewer); 0 for sky.
    segmentation: (batch, size, size) int64, indices into `vocabulary.PARTS`.
    edges: (batch, size, size) in [0, 1], outlines of the object and the horizon.
    keypoints: (batch, 5, 2), pixel coordinates (x right, y down); facial landmarks for persons.
    """

    pixels: Tensor
    depth: Tensor
    normals: Tensor
    segmentation: Tensor
    edges: Tensor
    keypoints: Tensor


@torch.inference_mode()
def render(scenes: list[Scene], size_px: int = 64) -> Render:
    """Draw scenes; the picture of a scene does not depend on its neighbours in the list.

    Raises:
        ImpromptError: no scenes, or a size below 16 pixels.
    """
    if not scenes:
        raise ImpromptError("nothing to render: the list of scenes is empty")
    if size_px < 16:
        raise ImpromptError(f"size_px is {size_px}; scenes are drawn from 16 pixels up")
    pixels = torch.empty(len(scenes), 3, size_px, size_px)
    keypoints = torch.empty(len(scenes), 5, 2)
    traced: list[Surfaces] = []
    order: list[int] = []
    for indices in _groups([scene.kind for scene in scenes]):
        group = [scenes[i] for i in indices]
        # Scenes that differ in their paint only are traced once.
        shapes = [replace(scene, **_PAINT) for scene in group]
        rows = {shape: row for row, shape in enumerate(dict.fromkeys(shapes))}
        surfaces = trace(list(rows), size_px * _SUPERSAMPLING)
        if len(rows) < len(group):
            surfaces = surfaces.at(torch.tensor([rows[shape] for shape in shapes]))
        traced.append(surfaces)
        keypoints[indices] = keypoints_of(group, size_px)
        order.extend(indices)
    surfaces = Surfaces(
        **{f.name: torch.cat([getattr(one, f.name) for one in traced]) for f in fields(Surfaces)}
    ).at(torch.tensor(order).argsort())
    for indices in _groups([scene.style for scene in scenes]):
        canvas = canvas_of([scenes[i] for i in indices], surfaces.at(torch.tensor(indices)))
        painted = STYLE_PAINTERS[scenes[indices[0]].style](canvas).clamp(0, 1)
        pixels[indices] = functional.avg_pool2d(painted, _SUPERSAMPLING) * 2 - 1
    lines, horizon = outlines(surfaces, 3)
    step = _SUPERSAMPLING
    return Render(
        pixels=pixels,
        depth=surfaces.depth[:, ::step, ::step].clone(),
        normals=surfaces.normals[:, :, ::step, ::step].clone(),
        segmentation=surfaces.parts[:, ::step, ::step].clone(),
        edges=functional.avg_pool2d(torch.maximum(lines, horizon)[:, None], step)[:, 0],
        keypoints=keypoints,
    )


def landmarks_of(scenes: list[Scene]) -> Tensor:
    """Facial landmarks as fractions of width and height, (batch, 5, 2), without drawing anything."""
    return keypoints_of(scenes, 1)


def _groups(labels: list[str]) -> list[list[int]]:
    """Indices of equal labels, in order of first appearance."""
    found: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        found.setdefault(label, []).append(index)
    return list(found.values())
