"""The five facial landmarks as a picture that a ControlNet can see, and their file.

The order is that of face detectors: left eye, right eye, nose, left and right corner of the mouth,
left being the viewer's. Places are fractions of width and height.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.core.errors import ImpromptError

COLOURS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0))
NOSE = 2
LIMB_SHADE = 0.6
MAX_FRACTION = 2.0
# What InstantID's published weights know, from 1024 px of the longer side on; less in smaller pictures.
POINT_RADIUS_PX, LIMB_RADIUS_PX = 10, 4
FULL_SIZE_PX = 1024
MIN_POINT_RADIUS_PX, MIN_LIMB_RADIUS_PX = 1.4, 0.7


def landmark_images(
    landmarks: Float[Tensor, "batch 5 2"], height: int, width: int
) -> Float[Tensor, "batch 3 height width"]:
    """Coloured points and darker limbs from the nose to each, on black, in [0, 1].

    A limb is an ellipse, widest half way. Points lie on top.

    Source: InstantID (2401.07519), section 3.3, and the drawing of its published code.
    """
    smaller = min(1.0, max(height, width) / FULL_SIZE_PX)
    point_radius = max(MIN_POINT_RADIUS_PX, POINT_RADIUS_PX * smaller)
    limb_radius = max(MIN_LIMB_RADIUS_PX, LIMB_RADIUS_PX * smaller)
    device = landmarks.device
    y = torch.arange(height, device=device)[:, None] + 0.5
    x = torch.arange(width, device=device)[None, :] + 0.5
    places = landmarks.float() * landmarks.new_tensor([width, height]).float()
    px, py = places[..., 0, None, None], places[..., 1, None, None]  # (batch, 5, 1, 1)
    colours = torch.tensor(COLOURS, device=device)
    picture = torch.zeros(len(landmarks), 3, height, width, device=device)

    def lay(colour: Tensor, beyond: Tensor) -> None:
        """Paint where a pixel's middle is at most half a pixel beyond the edge, the rest in part."""
        cover = (0.5 - beyond).clamp(0, 1)[:, None]
        torch.lerp(picture, colour[:, None, None].expand_as(picture), cover, out=picture)

    limbs = [point for point in range(len(COLOURS)) if point != NOSE]
    for point in limbs:
        across, down = px[:, point] - px[:, NOSE], py[:, point] - py[:, NOSE]
        length = torch.hypot(across, down).clamp(min=1e-3)
        from_x = x - (px[:, NOSE] + px[:, point]) / 2
        from_y = y - (py[:, NOSE] + py[:, point]) / 2
        along = (from_x * across + from_y * down) / length
        aside = (from_y * across - from_x * down) / length
        lay(LIMB_SHADE * colours[point], beyond_ellipse(along, aside, length / 2, limb_radius))
    for point in range(len(COLOURS)):
        distance = torch.hypot(x - px[:, point], y - py[:, point])
        lay(colours[point], distance - point_radius)
    return picture


def beyond_ellipse(x: Tensor, y: Tensor, half_length: Tensor, half_width: float) -> Tensor:
    """How far places (x, y) are outside an ellipse around 0, in pixels, negative inside; right near its edge.

    There (f - 1) / |∇f| with f = √((x / a)² + (y / b)²) is the distance to first order.
    """
    f = torch.hypot(x / half_length, y / half_width).clamp(min=1e-6)
    gradient = torch.hypot(x / half_length**2, y / half_width**2) / f
    return (f - 1) / gradient.clamp(min=1e-6)


def landmarks_at_size(
    landmarks: Float[Tensor, "batch 5 2"], size: tuple[int, int], wanted: tuple[int, int]
) -> Float[Tensor, "batch 5 2"]:
    """Where landmarks of a picture of one (height, width) are when it becomes one of another.

    The picture keeps its proportions: it covers the other and is cut in the middle, as pictures are for
    training, or is laid into it whole if a landmark would be cut off.
    """
    old, new = landmarks.new_tensor(size[::-1]), landmarks.new_tensor(wanted[::-1])
    from_middle = (landmarks - 0.5) * old
    covering = from_middle * (new / old).max() / new + 0.5
    if bool(((covering >= 0) & (covering <= 1)).all()):
        return covering
    return from_middle * (new / old).min() / new + 0.5


def read_landmarks(path: str | PathLike[str]) -> Float[Tensor, "1 5 2"]:
    """Landmarks from a JSON file: five pairs [x, y], fractions of width and height.

    Raises:
        ImpromptError: there is no such file, or it holds something else.
    """
    wanted = (
        f"{path} holds no landmarks: five pairs [x, y], fractions of width and height, are needed "
        "(left eye, right eye, nose, left and right corner of the mouth)"
    )
    try:
        values = torch.tensor(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ImpromptError(f"There is no landmarks file {path}.") from error
    except (OSError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise ImpromptError(f"{wanted}.") from error
    if values.shape != (5, 2):
        raise ImpromptError(f"{wanted}; its shape is {tuple(values.shape)}.")
    return checked_places(values, str(path))[None]


def checked_places(landmarks: Tensor, source: str) -> Float[Tensor, "*shape"]:
    """Landmarks as floats, if they may be fractions of a picture (a face may stand half outside).

    Raises:
        ImpromptError: they are not finite, or as far out as pixels are; `source` is named.
    """
    places = landmarks.to(torch.float32)
    if not bool(torch.isfinite(places).all()):
        raise ImpromptError(f"{source}: not all of these landmarks are finite numbers.")
    if bool((places.abs() > MAX_FRACTION).any()):
        raise ImpromptError(
            f"{source}: landmarks are fractions of width and height, and these seem to be pixels: "
            "divide them by the picture's size."
        )
    return places
