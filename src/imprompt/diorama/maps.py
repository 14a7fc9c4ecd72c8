"""Control maps: what a ControlNet or a T2I-Adapter sees of a scene, as pictures people could draw.

Each kind has one meaning whatever the scene, so that two maps can be compared:

    depth          2.5 / distance, grey: near is bright, the sky is black
    edges          white outlines of the object, its parts and the horizon on black
    segmentation   one colour for each part
    keypoints      five dots of five colours on black; on persons they are the facial landmarks
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from imprompt.core.errors import ImpromptError
from imprompt.diorama.rendering import Render
from imprompt.diorama.tracing import FAR

MAP_KINDS = ("depth", "edges", "segmentation", "keypoints")
NEAR = 2.5
"""World units: what is so near or nearer is white in a depth map."""

# In the order of `vocabulary.PARTS`; as far apart as eleven colours can be.
PART_COLOURS = (
    (0.35, 0.70, 0.95),
    (0.30, 0.55, 0.25),
    (0.90, 0.15, 0.15),
    (0.98, 0.93, 0.70),
    (0.10, 0.10, 0.20),
    (0.55, 0.33, 0.15),
    (0.60, 0.60, 0.60),
    (0.98, 0.65, 0.50),
    (0.60, 0.10, 0.70),
    (0.10, 0.95, 0.90),
    (1.00, 0.25, 0.70),
)
KEYPOINT_COLOURS = (
    (1.0, 0.2, 0.2),
    (0.2, 1.0, 0.2),
    (0.3, 0.4, 1.0),
    (1.0, 1.0, 0.2),
    (1.0, 0.2, 1.0),
)


def draw_maps(render: Render, kind: str) -> Float[Tensor, "batch 3 height width"]:
    """The control maps of rendered scenes, RGB in [0, 1].

    Raises:
        ImpromptError: there is no such kind.
    """
    if kind == "depth":
        return depth_map(render.depth)
    if kind == "edges":
        return render.edges[:, None].expand(-1, 3, -1, -1).clone()
    if kind == "segmentation":
        return segmentation_map(render.segmentation)
    if kind == "keypoints":
        return keypoint_map(render.keypoints, render.depth.shape[-1])
    raise ImpromptError(f"Scenes have no map {kind!r}; they have {', '.join(MAP_KINDS)}.")


def depth_map(depth: Float[Tensor, "batch height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Grey maps of distances in world units."""
    near = torch.where(depth >= FAR, 0.0, NEAR / depth).clamp(0, 1)
    return near[:, None].expand(-1, 3, -1, -1).clone()


def segmentation_map(
    parts: Int[Tensor, "batch height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """Coloured maps of part numbers."""
    return torch.tensor(PART_COLOURS)[parts].permute(0, 3, 1, 2).contiguous()


def parts_of_map(
    colours: Float[Tensor, "batch 3 height width"],
) -> Int[Tensor, "batch height width"]:
    """Part numbers of a segmentation map: of each pixel the part whose colour is nearest."""
    table = torch.tensor(PART_COLOURS).to(colours)
    difference = colours[:, None] - table[None, :, :, None, None]
    return difference.square().sum(2).argmin(1)


def keypoint_map(
    keypoints: Float[Tensor, "batch 5 2"], size_px: int
) -> Float[Tensor, "batch 3 size_px size_px"]:
    """Dots at pixel coordinates (x right, y down), a colour for each of the five."""
    axis = torch.arange(size_px) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius = size_px / 28
    maps = torch.zeros(len(keypoints), 3, size_px, size_px)
    for number, colour in enumerate(KEYPOINT_COLOURS):
        place = keypoints[:, number, :, None, None]
        distance = ((x - place[:, 0]).square() + (y - place[:, 1]).square()).sqrt()
        cover = (radius + 0.5 - distance).clamp(0, 1)[:, None]
        maps = torch.lerp(maps, torch.tensor(colour)[None, :, None, None].expand_as(maps), cover)
    return maps


def keypoints_of_map(
    maps: Float[Tensor, "batch 3 size_px size_px"],
) -> tuple[Float[Tensor, "batch 5 2"], Bool[Tensor, "batch 5"]]:
    """Pixel coordinates of the dots of a keypoint map, and which of them can be seen (not hidden
    under a later one)."""
    size_px = maps.shape[-1]
    axis = torch.arange(size_px, device=maps.device) + 0.5
    table = torch.tensor(KEYPOINT_COLOURS).to(maps)
    difference = (maps[:, None] - table[None, :, :, None, None]).square().sum(2).sqrt()
    cover = (1 - difference / 0.35).clamp(min=0)
    mass = cover.sum((2, 3))
    x = (cover * axis).sum((2, 3)) / mass.clamp(min=1e-6)
    y = (cover * axis[:, None]).sum((2, 3)) / mass.clamp(min=1e-6)
    whole_dot = 3.14 * (size_px / 28) ** 2
    return torch.stack([x, y], 2), mass > 0.6 * whole_dot
