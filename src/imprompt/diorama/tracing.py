"""Sphere tracing: from scenes to what each pixel sees (surface, normal, light), before any style.

Scenes of one kind are traced together. Only rays that can meet the object are marched: the ground is a
plane met exactly, and the object lies within a bounding sphere.

Source: Hart 1996, "Sphere tracing" (march by the distance bound); soft shadows after Quilez 2010.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from imprompt.diorama.characters import FaceNumbers, face_numbers, landmarks, person
from imprompt.diorama.objects import OBJECT_KEYPOINTS, OBJECT_SHAPES
from imprompt.diorama.primitives import Points
from imprompt.diorama.scene import Scene
from imprompt.diorama.vocabulary import GROUND, PERSON, SKY

FAR = 30.0
_HALF_VIEW = 0.36  # tangent of half the angle of view
_CAMERA_DISTANCE = 4.2
_BOUND_CENTER, _BOUND_RADIUS = 1.08, 1.52
_MARCH_STEPS, _SHADOW_STEPS = 44, 14
_HIT = 0.004

Solids = Callable[[Points, Tensor], list[tuple[Tensor, int]]]


@dataclass
class Surfaces:
    """What every pixel of a batch sees. Shapes (batch, height, width), normals (batch, 3, height, width).

    depth is the distance along the ray (`FAR` for sky); parts are vocabulary part numbers; normals are
    in camera axes (x right, y up, z to the viewer); diffuse = max(0, n·l); shadow and occlusion are 1 in
    full light; ray_y is the ray's upward slope.
    """

    depth: Tensor
    parts: Tensor
    normals: Tensor
    diffuse: Tensor
    shadow: Tensor
    occlusion: Tensor
    ray_y: Tensor

    def at(self, order: Tensor) -> Surfaces:
        """The same surfaces with the batch re-ordered."""
        return Surfaces(**{field.name: getattr(self, field.name)[order] for field in fields(self)})


@dataclass
class Camera:
    """Where a batch of scenes is seen from, in each object's own axes. `axes` rows: right, up, back."""

    position: Tensor
    axes: Tensor
    offset: Tensor

    @classmethod
    def of(cls, scenes: list[Scene]) -> Camera:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32)

        turn = column([math.radians(scene.turn_degrees) for scene in scenes])
        rise = column([math.radians(scene.camera_degrees) for scene in scenes])
        zoom = column([scene.zoom for scene in scenes])
        # A turned object seen by a fixed camera is a fixed object seen by a camera turned the other way.
        zero = torch.zeros_like(turn)
        right = torch.stack([turn.cos(), zero, turn.sin()], 1)
        back = torch.stack([-turn.sin() * rise.cos(), rise.sin(), turn.cos() * rise.cos()], 1)
        up = torch.linalg.cross(back, right)
        target = torch.tensor([0.0, 1.02, 0.0])
        position = target + back * (_CAMERA_DISTANCE / zoom)[:, None]
        return cls(position, torch.stack([right, up, back], 1), column([s.offset for s in scenes]))

    def rays(self, size_px: int) -> Tensor:
        """Unit directions, shape (batch, size_px * size_px, 3), rows from top to bottom."""
        grid = (torch.arange(size_px) + 0.5) / size_px * 2.0 - 1.0
        y, x = torch.meshgrid(-grid, grid, indexing="ij")
        x = (x.reshape(1, -1) - self.offset[:, None]) * _HALF_VIEW
        y = (y.reshape(1, -1) * _HALF_VIEW).expand_as(x)
        directions = torch.stack([x, y, -torch.ones_like(x)], 2) @ self.axes
        return directions / directions.norm(dim=2, keepdim=True)

    def project(self, points: Tensor, size_px: int) -> Tensor:
        """Pixel coordinates (x right, y down) of object-space points (points, 3): (batch, points, 2)."""
        seen = (points[None] - self.position[:, None]) @ self.axes.transpose(1, 2)
        x = seen[..., 0] / (-seen[..., 2] * _HALF_VIEW) + self.offset[:, None]
        y = seen[..., 1] / (-seen[..., 2] * _HALF_VIEW)
        return torch.stack([(x + 1) / 2, (1 - y) / 2], 2) * size_px


def solids_of(kind: str) -> Solids:
    """The function that lists the solids of a kind, given points and the parameters per point."""
    if kind == PERSON:
        return lambda points, parameters: person(points, FaceNumbers(*parameters))
    shape = OBJECT_SHAPES[kind]
    return lambda points, parameters: shape(points, parameters[0])


def parameters_of(scenes: list[Scene]) -> Tensor:
    """What varies between scenes of one kind, shape (parameters, batch)."""
    if scenes[0].kind == PERSON:
        face = face_numbers([scene.character for scene in scenes if scene.character is not None])
        return torch.stack([getattr(face, field.name) for field in fields(face)])
    return torch.tensor([[scene.shape for scene in scenes]], dtype=torch.float32)


def keypoints_of(scenes: list[Scene], size_px: int) -> Tensor:
    """Five projected points per scene (facial landmarks for persons), shape (batch, 5, 2), in pixels."""
    kind = scenes[0].kind
    points = (
        landmarks() if kind == PERSON else torch.tensor(OBJECT_KEYPOINTS[kind], dtype=torch.float32)
    )
    return Camera.of(scenes).project(points, size_px)


def trace(scenes: list[Scene], size_px: int) -> Surfaces:
    """Trace scenes that are all of one kind at size_px × size_px."""
    solids = solids_of(scenes[0].kind)
    parameters = parameters_of(scenes)
    camera = Camera.of(scenes)
    directions = camera.rays(size_px)
    batch, num_rays, _ = directions.shape
    scene_of_ray = torch.arange(batch).repeat_interleave(num_rays)
    direction = directions.reshape(-1, 3)
    origin = camera.position[scene_of_ray]
    ground_y = -0.75 if scenes[0].kind == PERSON else 0.0

    to_ground = (ground_y - origin[:, 1]) / direction[:, 1]
    to_ground = torch.where(to_ground > 0, to_ground, torch.full_like(to_ground, FAR)).clamp(
        max=FAR
    )
    enter, leave = _sphere_crossing(origin, direction)
    candidates = torch.nonzero((leave > enter) & (to_ground > enter))[:, 0]
    hit, depth_of_hit = _march(
        solids,
        origin[candidates],
        direction[candidates],
        enter[candidates],
        torch.minimum(leave, to_ground)[candidates],
        parameters[:, scene_of_ray[candidates]],
    )
    hits = candidates[hit]
    depth = to_ground.clone()
    depth[hits] = depth_of_hit[hit]
    position = origin + direction * depth[:, None]

    parts = torch.where(depth >= FAR, SKY, GROUND)
    normal = torch.zeros_like(direction)
    normal[:, 1] = (parts == GROUND).float()
    parts[hits], normal[hits] = _material_and_normal(
        solids, position[hits], parameters[:, scene_of_ray[hits]]
    )

    light = _light_directions(scenes, camera)[scene_of_ray]
    diffuse = (normal * light).sum(1).clamp(min=0)
    shadow, occlusion = _light_received(
        solids, position, normal, light, parts, parameters, scene_of_ray, hits
    )
    in_camera = (normal.reshape(batch, num_rays, 3) @ camera.axes.transpose(1, 2)).transpose(1, 2)

    def image(values: Tensor) -> Tensor:
        return values.reshape(batch, size_px, size_px)

    return Surfaces(
        depth=image(depth),
        parts=image(parts),
        normals=in_camera.reshape(batch, 3, size_px, size_px),
        diffuse=image(diffuse),
        shadow=image(shadow),
        occlusion=image(occlusion),
        ray_y=image(direction[:, 1]),
    )


def _light_directions(scenes: list[Scene], camera: Camera) -> Tensor:
    """Unit vectors towards the light in object axes; azimuth is relative to the camera."""
    azimuth = torch.tensor([math.radians(scene.light_degrees) for scene in scenes])
    elevation = math.radians(48.0)
    right = camera.axes[:, 0]
    back = camera.axes[:, 2] * torch.tensor([1.0, 0.0, 1.0])
    back = back / back.norm(dim=1, keepdim=True)
    flat = right * azimuth.sin()[:, None] + back * azimuth.cos()[:, None]
    return flat * math.cos(elevation) + torch.tensor([0.0, math.sin(elevation), 0.0])


def _sphere_crossing(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Distances at which rays enter and leave the bounding sphere; leave ≤ enter where they miss it."""
    to_center = origin - torch.tensor([0.0, _BOUND_CENTER, 0.0])
    along = -(to_center * direction).sum(1)
    squared = _BOUND_RADIUS**2 - (to_center * to_center).sum(1) + along * along
    half = squared.clamp(min=0).sqrt()
    return (along - half).clamp(min=0), torch.where(
        squared > 0, along + half, torch.zeros_like(along)
    )


def _distance(solids: Solids, points: Tensor, parameters: Tensor) -> Tensor:
    parts = solids((points[0], points[1], points[2]), parameters)
    distance = parts[0][0]
    for other, _ in parts[1:]:
        distance = torch.minimum(distance, other)
    return distance


def _march(
    solids: Solids,
    origin: Tensor,
    direction: Tensor,
    start: Tensor,
    end: Tensor,
    parameters: Tensor,
) -> tuple[Tensor, Tensor]:
    """Follow rays until they touch a solid or pass `end`; rays that are done leave the computation."""
    reached = start.clone()
    hit = torch.zeros_like(start, dtype=torch.bool)
    alive = torch.arange(start.numel())
    o, d, t, last, extra = origin.T.contiguous(), direction.T.contiguous(), start, end, parameters
    for step in range(_MARCH_STEPS):
        if alive.numel() == 0:
            break
        distance = _distance(solids, o + d * t, extra)
        touching = distance < _HIT
        t = torch.where(touching, t, t + distance * 0.92)
        if step % 3 == 2 or step == _MARCH_STEPS - 1:
            reached[alive], hit[alive] = t, touching
            keep = torch.nonzero(~touching & (t < last))[:, 0]
            alive, o, d = alive[keep], o[:, keep], d[:, keep]
            t, last, extra = t[keep], last[keep], extra[:, keep]
    return hit & (reached < end), reached


def _material_and_normal(
    solids: Solids, points: Tensor, parameters: Tensor
) -> tuple[Tensor, Tensor]:
    """Part numbers and unit normals (by four-point differences) at surface points (n, 3)."""
    p = points.T.contiguous()
    listed = solids((p[0], p[1], p[2]), parameters)
    numbers = torch.tensor([part for _, part in listed])
    nearest = torch.stack([distance for distance, _ in listed]).argmin(0)
    step = 0.006
    normal = torch.zeros_like(p)
    for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        offset = torch.tensor(corner, dtype=p.dtype)[:, None]
        normal += offset * _distance(solids, p + offset * step, parameters)
    return numbers[nearest], (normal / normal.norm(dim=0).clamp(min=1e-9)).T


def _light_received(
    solids: Solids,
    position: Tensor,
    normal: Tensor,
    light: Tensor,
    parts: Tensor,
    parameters: Tensor,
    scene_of_ray: Tensor,
    hits: Tensor,
) -> tuple[Tensor, Tensor]:
    """Soft shadow and ambient occlusion, marched only where the object can cast them."""
    shadow, occlusion = torch.ones_like(position[:, 0]), torch.ones_like(position[:, 0])
    enter, leave = _sphere_crossing(position, light)
    near_ground = (parts == GROUND) & (leave > enter)
    lit = torch.zeros_like(near_ground)
    lit[hits] = True
    shaded = torch.nonzero(lit | near_ground)[:, 0]
    extra = parameters[:, scene_of_ray[shaded]]
    start = (position[shaded] + normal[shaded] * 0.03).T.contiguous()
    towards = light[shaded].T.contiguous()
    t = torch.where(
        lit[shaded], torch.full_like(enter[shaded], 0.04), enter[shaded].clamp(min=0.02)
    )
    brightness = torch.ones_like(t)
    for _ in range(_SHADOW_STEPS):
        distance = _distance(solids, start + towards * t, extra)
        brightness = torch.minimum(brightness, 7.0 * distance / t)
        t = t + distance.clamp(min=0.03, max=0.3)
    shadow[shaded] = brightness.clamp(0, 1)

    around = torch.nonzero(lit | ((parts == GROUND) & (position.norm(dim=1) < 2.4)))[:, 0]
    extra = parameters[:, scene_of_ray[around]]
    for reach in (0.12, 0.4):
        probe = (position[around] + normal[around] * reach).T.contiguous()
        occlusion[around] *= 0.4 + 0.6 * (_distance(solids, probe, extra) / reach).clamp(0, 1)
    return shadow, occlusion
