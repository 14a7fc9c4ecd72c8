"""The six styles: from surfaces to a painted picture, values in [0, 1], at the traced resolution.

Lengths are in pixels of a 128-pixel picture and scale with the size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from imprompt.diorama.painting import Canvas, blur, displaced, outlines

_PAPER = torch.tensor([0.98, 0.96, 0.92])[None, :, None, None]


def clay(canvas: Canvas) -> Tensor:
    """Soft matte shading with contact shadows, as of a small model on a table."""
    surfaces = canvas.surfaces
    bump = 1.0 + 0.05 * canvas.fine_noise[:, :1] * canvas.on_object[:, None]
    direct = (surfaces.diffuse * surfaces.shadow)[:, None] * bump
    sky_light = 0.5 + 0.12 * surfaces.normals[:, 1:2]
    light = (sky_light + 0.62 * direct) * surfaces.occlusion[:, None]
    sky = (surfaces.parts == 0)[:, None]
    rim = (1.0 - surfaces.normals[:, 2:3].clamp(0, 1)) ** 3 * 0.12 * canvas.on_object[:, None]
    painted = torch.where(sky, canvas.albedo, canvas.albedo * light + rim)
    return painted * 0.98 + 0.01


def cartoon(canvas: Canvas) -> Tensor:
    """Two flat tones, strong colours, thick black outlines."""
    surfaces = canvas.surfaces
    lit = (surfaces.diffuse * surfaces.shadow > 0.3).float()[:, None]
    highlight = (surfaces.diffuse * surfaces.shadow > 0.97).float()[:, None] * canvas.on_object[
        :, None
    ]
    tone = torch.where(canvas.on_object[:, None], 0.70 + 0.32 * lit, 0.80 + 0.2 * lit)
    tone = torch.where((surfaces.parts == 0)[:, None], torch.ones_like(tone), tone)
    grey = canvas.albedo.mean(1, keepdim=True)
    strong = (grey + (canvas.albedo - grey) * 1.15).clamp(0, 1)
    painted = torch.lerp(strong * tone, torch.ones_like(strong), highlight * 0.5)
    lines, horizon = outlines(surfaces, _odd(canvas, 3.0))
    ink = torch.maximum(lines, 0.35 * horizon)[:, None]
    return painted * (1 - ink) + 0.05 * ink


def line_art(canvas: Canvas) -> Tensor:
    """Lines in the object's colours on white paper, a pale wash inside."""
    surfaces = canvas.surfaces
    inside = canvas.on_object[:, None].float()
    wash = 1.0 - (0.30 * inside + 0.10 * (1 - inside)) * (1.0 - canvas.albedo)
    lines, horizon = outlines(surfaces, _odd(canvas, 3.0))
    painted = wash * (1 - 0.35 * horizon[:, None])
    ink = _spread(canvas.albedo * inside, inside) * 0.82
    return torch.lerp(painted, ink, lines[:, None])


def neon(canvas: Canvas) -> Tensor:
    """Glowing tubes along the outlines in the dark."""
    surfaces = canvas.surfaces
    inside = canvas.on_object[:, None].float()
    scale = surfaces.parts.shape[-1] / 128.0
    lines, horizon = outlines(surfaces, _odd(canvas, 2.6))
    tube = _spread(canvas.albedo * inside, inside)
    tube = tube / tube.amax(1, keepdim=True).clamp(min=0.35)
    emission = tube * lines[:, None]
    glow = 0.9 * blur(emission, 2.2 * scale) + 1.3 * blur(emission, 6.5 * scale)
    dark = 0.03 + 0.16 * canvas.backdrop * torch.tensor([0.75, 0.7, 1.15])[None, :, None, None]
    body = inside * canvas.albedo * (0.10 + 0.16 * surfaces.diffuse[:, None])
    painted = torch.where(inside > 0, body, dark) + 0.25 * canvas.backdrop * horizon[:, None] + glow
    core = torch.lerp(emission, lines[:, None].expand_as(emission), 0.35)
    return torch.maximum(painted, core).clamp(0, 1)


def watercolor(canvas: Canvas) -> Tensor:
    """Pale washes that pool at their borders and run out into the paper."""
    surfaces = canvas.surfaces
    scale = surfaces.parts.shape[-1] / 128.0
    inside = canvas.on_object[:, None].float()
    light = 0.72 + 0.30 * (surfaces.diffuse * surfaces.shadow)[:, None]
    light = torch.where((surfaces.parts == 0)[:, None], torch.ones_like(light), light)
    density = 0.80 * inside + 0.42 * (1 - inside)
    density = density * (1.0 + 0.16 * canvas.smooth_noise[:, :1] + 0.07 * canvas.fine_noise[:, :1])
    pooled = (inside - blur(inside, 3.0 * scale)).abs() * 0.5
    wash = 1.0 - (density + pooled * inside) * (1.0 - canvas.albedo * light)
    running = displaced(wash, canvas.smooth_noise[:, 2:4] + 0.4 * canvas.fine_noise, 1.6 * scale)
    size = inside.shape[-1]
    axis = ((torch.arange(size) + 0.5) / size * 2 - 1).abs()
    border = torch.maximum(axis[:, None], axis[None, :])[None, None]
    fade = ((border + 0.07 * canvas.smooth_noise[:, 1:2] - 0.74) * 5.0).clamp(0, 1)
    return torch.lerp(running, _PAPER.expand_as(running), fade)


def crayon(canvas: Canvas) -> Tensor:
    """Diagonal strokes that let the paper through, with a waxy outline."""
    surfaces = canvas.surfaces
    size = surfaces.parts.shape[-1]
    scale = size / 128.0
    inside = canvas.on_object[:, None].float()
    axis = torch.arange(size, dtype=torch.float32) / scale
    diagonal = (axis[:, None] + axis[None, :])[None, None] + 1.6 * canvas.smooth_noise[:, :1]
    stroke = 0.5 + 0.5 * torch.sin(diagonal * 0.62)
    cover = (0.30 + 0.95 * stroke + 0.14 * canvas.fine_noise[:, :1]).clamp(0, 1)
    cover = cover * (0.95 * inside + 0.60 * (1 - inside))
    light = 0.70 + 0.36 * (surfaces.diffuse * surfaces.shadow)[:, None]
    light = torch.where((surfaces.parts == 0)[:, None], torch.ones_like(light), light)
    painted = torch.lerp(
        _PAPER.expand_as(canvas.albedo), (canvas.albedo * light).clamp(0, 1), cover
    )
    lines, _ = outlines(surfaces, _odd(canvas, 3.0))
    waxy = _spread(canvas.albedo * inside, inside) * 0.55
    painted = torch.lerp(painted, waxy, lines[:, None] * 0.85)
    return displaced(painted, canvas.fine_noise, 0.7 * scale)


def _odd(canvas: Canvas, length_px: float) -> int:
    """A line width in pixels of this canvas, as the odd number that pooling wants."""
    wanted = length_px * canvas.surfaces.parts.shape[-1] / 128.0
    return max(1, 2 * round((wanted - 1) / 2) + 1)


def _spread(colours: Tensor, mask: Tensor) -> Tensor:
    """Carry colours a little beyond their mask, so that lines on the silhouette have the inside's."""
    radius = 2.0 * colours.shape[-1] / 128.0
    return torch.where(
        mask > 0, colours, blur(colours, radius) / blur(mask, radius).clamp(min=0.02)
    )


STYLE_PAINTERS: dict[str, Callable[[Canvas], Tensor]] = {
    "clay": clay,
    "cartoon": cartoon,
    "line art": line_art,
    "neon": neon,
    "watercolor": watercolor,
    "crayon": crayon,
}
