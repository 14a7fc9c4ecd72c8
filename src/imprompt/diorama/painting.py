"""Colours and helpers that all styles share: albedo, backdrop, outlines, paper grain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from imprompt.core.randomness import generator
from imprompt.diorama import vocabulary as words
from imprompt.diorama.scene import Scene
from imprompt.diorama.tracing import FAR, Surfaces

_NUM_SMOOTH, _NUM_FINE = 4, 2


@dataclass
class Canvas:
    """All a style needs: surfaces, per-pixel colours (batch, 3, h, w) and noise fields (batch, k, h, w)."""

    surfaces: Surfaces
    albedo: Tensor
    on_object: Tensor  # (batch, h, w) bool
    backdrop: Tensor
    smooth_noise: Tensor
    fine_noise: Tensor
    colour: Tensor  # the scene's colour (batch, 3, 1, 1)


def canvas_of(scenes: list[Scene], surfaces: Surfaces) -> Canvas:
    size = surfaces.parts.shape[-1]
    smooth, fine = _noise_fields(scenes, size)
    on_object = surfaces.parts > words.GROUND
    tables = torch.stack([_part_colours(scene) for scene in scenes])
    batch = torch.arange(len(scenes))[:, None, None]
    backdrop = _backdrop(scenes, surfaces, smooth)
    albedo = tables[batch, surfaces.parts].permute(0, 3, 1, 2)
    albedo = torch.where(on_object[:, None], albedo, backdrop)
    colour = torch.tensor([words.COLOURS[scene.colour] for scene in scenes])[:, :, None, None]
    return Canvas(surfaces, albedo, on_object, backdrop, smooth, fine, colour)


def _part_colours(scene: Scene) -> Tensor:
    table = torch.zeros(len(words.PARTS), 3)
    for part, rgb in words.FIXED_PART_COLOURS.items():
        table[part] = torch.tensor(rgb)
    table[words.MAIN] = torch.tensor(words.COLOURS[scene.colour])
    if scene.character is not None:
        table[words.SKIN] = torch.tensor(words.SKIN_TONES[scene.character.skin])
        table[words.HAIR] = torch.tensor(words.HAIR_COLOURS[scene.character.hair_colour])
        table[words.EYE] = torch.tensor(words.EYE_COLOURS[scene.character.eyes])
    return table


def _noise_fields(scenes: list[Scene], size: int) -> tuple[Tensor, Tensor]:
    """Smooth and fine noise of unit variance at the knots, a function of each scene's seed."""
    smooth, fine = [], []
    for scene in scenes:
        random = generator(scene.seed, 0, "diorama.texture")
        smooth.append(
            torch.from_numpy(random.standard_normal((_NUM_SMOOTH, 7, 7), dtype="float32"))
        )
        fine.append(torch.from_numpy(random.standard_normal((_NUM_FINE, 28, 28), dtype="float32")))

    def stretch(knots: list[Tensor]) -> Tensor:
        return functional.interpolate(
            torch.stack(knots), (size, size), mode="bicubic", align_corners=True
        )

    return stretch(smooth), stretch(fine)


def _backdrop(scenes: list[Scene], surfaces: Surfaces, noise: Tensor) -> Tensor:
    """Sky and ground of each scene's setting, with what belongs in its sky."""
    colours = torch.tensor([words.SETTING_COLOURS[scene.setting] for scene in scenes])
    top, horizon, near, far = (colours[:, i, :, None, None] for i in range(4))
    height = (surfaces.ray_y / 0.32).clamp(0, 1)[:, None]
    sky = torch.lerp(horizon.expand(-1, -1, *height.shape[2:]), top, height)
    sky = _with_sky_signs(scenes, sky, surfaces.ray_y, noise)
    distance = (surfaces.depth / 11.0 - 0.3).clamp(0, 1)[:, None]
    ground = torch.lerp(near.expand(-1, -1, *distance.shape[2:]), far, distance)
    ground = ground * (1.0 + 0.05 * noise[:, 1:2])
    return torch.where((surfaces.parts == words.SKY)[:, None], sky, ground).clamp(0, 1)


def _with_sky_signs(scenes: list[Scene], sky: Tensor, ray_y: Tensor, noise: Tensor) -> Tensor:
    """Clouds over the meadow, dunes in the desert, hills in the snow, moon and stars at night."""
    size = sky.shape[-1]
    axis = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    sky = sky.clone()
    for index, scene in enumerate(scenes):
        random = generator(scene.seed, 0, "diorama.sky")
        across, phase = float(random.uniform(0.1, 0.9)), float(random.uniform(0, 6.28))
        ridge = 0.045 + 0.03 * torch.sin(x * 5.0 + phase) + 0.018 * torch.sin(x * 11.0 + 2 * phase)
        if scene.setting == "meadow":
            cloud = ((noise[index, 2] - 0.35) * 1.6 + (ray_y[index] - 0.05) * 3).clamp(0, 1) * 0.85
            cloud = cloud * (ray_y[index] / 0.12).clamp(0, 1)
            sky[index] = torch.lerp(sky[index], torch.ones(3, 1, 1), cloud)
            _paint(sky[index], ray_y[index] < ridge, (0.50, 0.70, 0.46))
        elif scene.setting == "desert":
            _paint(sky[index], (x - across) ** 2 + (y - 0.12) ** 2 < 0.006, (1.0, 0.97, 0.80))
            _paint(sky[index], ray_y[index] < ridge, (0.90, 0.73, 0.54))
        elif scene.setting == "snow":
            _paint(sky[index], ray_y[index] < ridge * 1.6, (0.78, 0.84, 0.92))
        elif scene.setting == "night":
            stars = torch.from_numpy(random.uniform(0, 1, (14, 2)).astype("float32"))
            for star_x, star_y in stars.tolist():
                _paint(
                    sky[index],
                    (x - star_x).abs() + (y - star_y * 0.6).abs() < 0.011,
                    (0.9, 0.9, 0.8),
                )
            moon = (x - across) ** 2 + (y - 0.13) ** 2 < 0.0055
            bite = (x - across - 0.035) ** 2 + (y - 0.115) ** 2 < 0.0048
            _paint(sky[index], moon & ~bite, (0.97, 0.95, 0.80))
    return sky


def _paint(image: Tensor, where: Tensor, colour: tuple[float, float, float]) -> None:
    image[:, where] = torch.tensor(colour)[:, None]


def outlines(surfaces: Surfaces, thickness: int) -> tuple[Tensor, Tensor]:
    """Ink lines (batch, h, w) in {0, 1}: of the object (silhouette, parts, creases), of the horizon.

    `thickness` is in pixels of the traced picture and odd.
    """
    parts, depth, normals = surfaces.parts, surfaces.depth.clamp(max=FAR), surfaces.normals
    on_object = parts > words.GROUND

    def between(first: Tensor, second: Tensor) -> Tensor:
        return first != second

    line = torch.zeros_like(depth)
    horizon = torch.zeros_like(depth)
    for axis in (1, 2):
        here = [slice(None)] * 3
        there = [slice(None)] * 3
        here[axis], there[axis] = slice(0, -1), slice(1, None)
        a, b = tuple(here), tuple(there)
        touches = on_object[a] | on_object[b]
        both = on_object[a] & on_object[b]
        jump = (depth[a] - depth[b]).abs() > 0.16
        dot = (normals[(a[0], slice(None), *a[1:])] * normals[(b[0], slice(None), *b[1:])]).sum(1)
        marked = touches & (between(parts[a], parts[b]) | (both & (jump | (dot < 0.55))))
        line[a] = torch.maximum(line[a], marked.float())
        horizon[a] = torch.maximum(horizon[a], (~touches & between(parts[a], parts[b])).float())

    def thicken(mask: Tensor, width: int) -> Tensor:
        return functional.max_pool2d(mask[:, None], width, 1, width // 2)[:, 0]

    return thicken(line, thickness), thicken(horizon, max(1, thickness - 2))


def blur(image: Tensor, radius_px: float) -> Tensor:
    """Gaussian blur of (batch, channels, h, w), borders repeated."""
    reach = max(1, round(radius_px * 2.5))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / radius_px) ** 2)
    kernel = kernel / kernel.sum()
    channels = image.shape[1]
    row = kernel[None, None, None, :].expand(channels, 1, 1, -1)
    padded = functional.pad(image, (reach, reach, reach, reach), mode="replicate")
    across = functional.conv2d(padded, row, groups=channels)
    return functional.conv2d(across, row.transpose(2, 3), groups=channels)


def displaced(image: Tensor, noise: Tensor, amount_px: float) -> Tensor:
    """Shift pixels by noise (batch, 2, h, w), as a trembling hand or running paint would."""
    size = image.shape[-1]
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x, y], 2)[None] + noise.permute(0, 2, 3, 1) * (2 * amount_px / size)
    return functional.grid_sample(image, grid, padding_mode="border", align_corners=False)
