"""Signed distances of simple solids: negative inside, positive outside.

A point set is three tensors `(x, y, z)` of one shape; y is up. Numbers may be floats or tensors that
broadcast against the points.

Source: the distance formulas are the classical ones collected by Inigo Quilez ("distance functions").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Points = tuple[Tensor, Tensor, Tensor]
Number = int | float | Tensor
Vector = tuple[Number, Number, Number]


def move(points: Points, offset: Vector) -> Points:
    """The points as seen from `offset`: a solid evaluated at the result stands at `offset`."""
    x, y, z = points
    return x - offset[0], y - offset[1], z - offset[2]


def turn_z(points: Points, degrees: int | float) -> Points:
    """Rotate the solid by `degrees` in the picture plane (about the z axis)."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y, z = points
    return cosine * x + sine * y, cosine * y - sine * x, z


def turn_x(points: Points, degrees: int | float) -> Points:
    """Tilt the solid by `degrees` about the x axis."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y, z = points
    return x, cosine * y + sine * z, cosine * z - sine * y


def mirror_x(points: Points) -> Points:
    """Make what stands at positive x stand at negative x, too."""
    return points[0].abs(), points[1], points[2]


def length(x: Tensor, y: Tensor, z: Tensor | None = None) -> Tensor:
    squared = x * x + y * y
    return (squared if z is None else squared + z * z).sqrt()


def sphere(points: Points, center: Vector, radius: Number) -> Tensor:
    return length(*move(points, center)) - radius


def ellipsoid(points: Points, center: Vector, radii: Vector) -> Tensor:
    """A close bound on the distance to an ellipsoid (exact only for spheres)."""
    x, y, z = move(points, center)
    scaled = length(x / radii[0], y / radii[1], z / radii[2])
    gradient = length(x / radii[0] ** 2, y / radii[1] ** 2, z / radii[2] ** 2)
    return scaled * (scaled - 1.0) / (gradient + 1e-6)


def box(points: Points, center: Vector, half: Vector, rounding: int | float = 0.0) -> Tensor:
    """A box with half extents `half`, its edges rounded within them."""
    x, y, z = move(points, center)
    x, y, z = (
        x.abs() - (half[0] - rounding),
        y.abs() - (half[1] - rounding),
        z.abs() - (half[2] - rounding),
    )
    outside = length(x.clamp(min=0), y.clamp(min=0), z.clamp(min=0))
    inside = torch.maximum(x, torch.maximum(y, z)).clamp(max=0)
    return outside + inside - rounding


def cylinder(points: Points, center: Vector, radius: Number, half_height: Number) -> Tensor:
    """A standing cylinder."""
    x, y, z = move(points, center)
    radial, vertical = length(x, z) - radius, y.abs() - half_height
    outside = length(radial.clamp(min=0), vertical.clamp(min=0))
    return outside + torch.maximum(radial, vertical).clamp(max=0)


def wheel(points: Points, center: Vector, radius: int | float, half_width: int | float) -> Tensor:
    """A cylinder that lies along the z axis."""
    x, y, z = move(points, center)
    return cylinder((x, z, y), (0.0, 0.0, 0.0), radius, half_width)


def cone(points: Points, base: Vector, radius: Number, height: Number) -> Tensor:
    """A standing cone on the point `base`; a bound good enough to trace."""
    x, y, z = move(points, base)
    slope = (length(x, z) - radius * (1.0 - y / height)) * (
        height / (height * height + radius * radius) ** 0.5
    )
    return torch.maximum(torch.maximum(slope, -y), y - height)


def capsule(points: Points, start: Vector, end: Vector, radius: Number) -> Tensor:
    """A round rod from `start` to `end`."""
    x, y, z = move(points, start)
    ax, ay, az = (float(e) - float(s) for s, e in zip(start, end, strict=True))
    along = ((x * ax + y * ay + z * az) / (ax * ax + ay * ay + az * az)).clamp(0, 1)
    return length(x - ax * along, y - ay * along, z - az * along) - radius


def torus(points: Points, center: Vector, radius: int | float, thickness: int | float) -> Tensor:
    """A ring in the picture plane (axis z)."""
    x, y, z = move(points, center)
    return length(length(x, y) - radius, z) - thickness


def roof(
    points: Points,
    center: Vector,
    half_width: int | float,
    height: int | float,
    half_depth: int | float,
) -> Tensor:
    """A gable whose ridge runs along z, standing on `center`."""
    x, y, z = move(points, center)
    slope = (x.abs() * height + y * half_width - half_width * height) / math.hypot(
        height, half_width
    )
    return torch.maximum(torch.maximum(slope, -y), z.abs() - half_depth)


def blend(first: Tensor, second: Tensor, width: int | float) -> Tensor:
    """Union with a smooth seam of about `width`."""
    mix = (0.5 + 0.5 * (second - first) / width).clamp(0, 1)
    return second + (first - second) * mix - width * mix * (1 - mix)


def carve(solid: Tensor, hollow: Tensor) -> Tensor:
    """The solid without the hollow."""
    return torch.maximum(solid, -hollow)
