"""The twelve kinds of objects, each a list of coloured solids about two units high on the ground y = 0.

The front faces +z. `shape` in [0, 1] varies proportions. A solid is (signed distance, part number);
MAIN parts carry the scene's colour and make up most of every object, so that its colour is plain.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from imprompt.diorama.primitives import (
    Points,
    blend,
    box,
    capsule,
    carve,
    cone,
    cylinder,
    ellipsoid,
    mirror_x,
    roof,
    sphere,
    torus,
    turn_x,
    turn_z,
    wheel,
)
from imprompt.diorama.vocabulary import CREAM, DARK, GREY, MAIN, WOOD

Solid = tuple[Tensor, int]
ObjectShape = Callable[[Points, Tensor], list[Solid]]


def house(p: Points, shape: Tensor) -> list[Solid]:
    walls = box(p, (0, 0.55, 0), (0.78, 0.56, 0.62), 0.03)
    windows = box(mirror_x(p), (0.46, 0.68, 0.62), (0.15, 0.17, 0.05))
    return [
        (walls, MAIN),
        (roof(p, (0, 1.06, 0), 1.0, 0.82, 0.75), DARK),
        (box(p, (0, 0.34, 0.62), (0.17, 0.36, 0.05)), WOOD),
        (windows, CREAM),
        (box(p, (0.52, 1.62, -0.2), (0.13, 0.3 + 0.08 * shape, 0.13)), GREY),
    ]


def tree(p: Points, shape: Tensor) -> list[Solid]:
    wide = 0.62 + 0.12 * shape
    crown = blend(
        blend(
            sphere(p, (-0.36, 1.2, 0), wide - 0.1), sphere(p, (0.38, 1.15, 0.1), wide - 0.12), 0.2
        ),
        sphere(p, (0, 1.55, -0.05), wide - 0.06),
        0.2,
    )
    return [(crown, MAIN), (cylinder(p, (0, 0.4, 0), 0.17, 0.42), WOOD)]


def mushroom(p: Points, shape: Tensor) -> list[Solid]:
    cap = carve(
        ellipsoid(p, (0, 1.05, 0), (1.0, 0.85 + 0.15 * shape, 1.0)),
        box(p, (0, 0.45, 0), (2.0, 0.6, 2.0)),
    )
    stem = blend(cylinder(p, (0, 0.5, 0), 0.3, 0.55), sphere(p, (0, 0.22, 0), 0.36), 0.15)
    spots = sphere(p, (0.0, 1.5, 0.74), 0.2)
    for x, y, z, radius in (
        (0.58, 1.35, 0.62, 0.16),
        (-0.58, 1.36, 0.6, 0.18),
        (0.3, 1.85, 0.25, 0.17),
        (-0.36, 1.8, 0.3, 0.15),
        (-0.9, 1.3, -0.05, 0.14),
        (0.92, 1.28, 0.0, 0.14),
    ):
        spots = spots.minimum(sphere(p, (x, y, z), radius))
    return [(cap, MAIN), (stem, CREAM), (spots, CREAM)]


def rocket(p: Points, shape: Tensor) -> list[Solid]:
    body = carve(
        ellipsoid(p, (0, 1.05, 0), (0.5 + 0.06 * shape, 1.12, 0.5 + 0.06 * shape)),
        box(p, (0, -0.3, 0), (2.0, 0.55, 2.0)),
    )
    x, y, z = mirror_x(p)
    fins = box(turn_z((x - 0.58, y - 0.36, z), -28), (0, 0, 0), (0.17, 0.42, 0.07), 0.05)
    fins = fins.minimum(
        box(turn_x((x, y - 0.36, z - 0.56), -25), (0, 0, 0), (0.07, 0.4, 0.16), 0.05)
    )
    nose = ellipsoid(p, (0, 1.88, 0), (0.27, 0.32, 0.27))
    window = sphere(p, (0, 1.3, 0.44), 0.2)
    return [(body, MAIN), (fins, DARK), (nose, GREY), (window, CREAM)]


def snowman(p: Points, shape: Tensor) -> list[Solid]:
    head_y = 1.58
    body = blend(sphere(p, (0, 0.52, 0), 0.58), sphere(p, (0, 1.14, 0), 0.38 + 0.05 * shape), 0.08)
    body = blend(body, sphere(p, (0, head_y, 0), 0.31), 0.06)
    hat = cylinder(p, (0, head_y + 0.21, 0), 0.4, 0.035).minimum(
        cylinder(p, (0, head_y + 0.38, 0), 0.25, 0.19)
    )
    arms = capsule(mirror_x(p), (0.36, 1.18, 0), (0.9, 1.48, 0.05), 0.05)
    nose = cone(turn_x((p[0], p[1] - head_y, p[2] - 0.26), 90), (0, 0, 0), 0.09, 0.32)
    eyes = sphere(mirror_x(p), (0.12, head_y + 0.1, 0.27), 0.055)
    buttons = sphere(p, (0, 1.25, 0.39), 0.06).minimum(sphere(p, (0, 1.02, 0.42), 0.06))
    return [(body, MAIN), (hat, DARK), (arms, WOOD), (nose, WOOD), (eyes, DARK), (buttons, DARK)]


def car(p: Points, shape: Tensor) -> list[Solid]:
    body = box(p, (0, 0.55, 0), (1.12, 0.3, 0.5), 0.14)
    cabin = box(p, (-0.08, 1.0, 0), (0.6 + 0.1 * shape, 0.34, 0.44), 0.16)
    windows = box(mirror_x((p[0] + 0.08, p[1], p[2])), (0.28, 1.02, 0.0), (0.2, 0.18, 0.47), 0.05)
    x, y, z = p[0].abs(), p[1], p[2].abs()
    wheels = wheel((x, y, z), (0.64, 0.3, 0.46), 0.3, 0.12)
    hubs = wheel((x, y, z), (0.64, 0.3, 0.5), 0.13, 0.11)
    lights = sphere((p[0], y, z), (1.08, 0.6, 0.3), 0.11)
    solids: list[Solid] = [(body.minimum(cabin), MAIN), (windows, CREAM), (wheels, DARK)]
    return [*solids, (hubs, GREY), (lights, CREAM)]


def boat(p: Points, shape: Tensor) -> list[Solid]:
    x, y, z = p
    hull = ellipsoid(p, (0, 0.52, 0), (1.1, 0.52, 0.5))
    hull = carve(hull, box(p, (0, 0.95, 0), (2.0, 0.42, 2.0)))
    mast = cylinder(p, (0.05, 1.25, 0), 0.055, 0.95)
    tall = 1.35 + 0.15 * shape
    sail = _triangle_plate(x + 0.02, y - 0.68, z, -0.92, tall).minimum(
        _triangle_plate(x - 0.16, y - 0.68, z, 0.72, tall * 0.86)
    )
    return [(hull, WOOD), (mast, DARK), (sail, MAIN)]


def _triangle_plate(x: Tensor, y: Tensor, z: Tensor, width: float, height: Tensor) -> Tensor:
    """A right-angled plate in the picture plane: upright at x = 0, its foot reaching to x = width."""
    along = x if width > 0 else -x
    wide = abs(width)
    slope = (along * height + y * wide - wide * height) / (height * height + wide * wide).sqrt()
    return slope.maximum(-along).maximum(-y).maximum(z.abs() - 0.06)


def cactus(p: Points, shape: Tensor) -> list[Solid]:
    trunk = capsule(p, (0, 0.5, 0), (0, 1.75, 0), 0.33)
    lift = 0.12 * shape
    x, y, z = p
    right = (x, y - lift, z)
    arms = capsule(right, (0.2, 0.95, 0), (0.72, 0.98, 0), 0.19)
    arms = arms.minimum(capsule(right, (0.72, 0.98, 0), (0.76, 1.5, 0), 0.19))
    left = (x, y + lift, z)
    arms = arms.minimum(capsule(left, (-0.2, 1.2, 0), (-0.7, 1.2, 0), 0.18))
    arms = arms.minimum(capsule(left, (-0.7, 1.2, 0), (-0.74, 1.62, 0), 0.18))
    pot = cylinder(p, (0, 0.24, 0), 0.5, 0.24).minimum(cylinder(p, (0, 0.46, 0), 0.58, 0.07))
    return [(blend(trunk, arms, 0.1), MAIN), (pot, WOOD)]


def mug(p: Points, shape: Tensor) -> list[Solid]:
    radius = 0.66 + 0.08 * shape
    wall = carve(
        cylinder(p, (-0.15, 0.78, 0), radius, 0.78),
        cylinder(p, (-0.15, 1.1, 0), radius - 0.1, 0.9),
    )
    handle = carve(
        torus(p, (0.62, 0.8, 0), 0.4, 0.12),
        cylinder(p, (-0.15, 0.8, 0), radius - 0.04, 1.2),
    )
    drink = cylinder(p, (-0.15, 1.22, 0), radius - 0.09, 0.1)
    return [(wall.minimum(handle), MAIN), (drink, WOOD)]


def castle(p: Points, shape: Tensor) -> list[Solid]:
    x, y, z = p
    side = mirror_x(p)
    walls = box(p, (0, 0.5, 0), (0.75, 0.52, 0.4))
    towers = cylinder(side, (0.78, 0.72, 0), 0.33, 0.74)
    keep = cylinder(p, (0, 1.0, -0.15), 0.36, 0.6 + 0.1 * shape)
    teeth = box((side[0], y, z.abs()), (0.16, 1.1, 0.32), (0.1, 0.12, 0.1))
    roofs = cone(side, (0.78, 1.44, 0), 0.44, 0.62)
    roofs = roofs.minimum(cone((x, y - 0.1 * shape, z), (0, 1.6, -0.15), 0.47, 0.68))
    gate = box(p, (0, 0.3, 0.4), (0.2, 0.32, 0.05), 0.04)
    slits = box(side, (0.78, 0.95, 0.33), (0.06, 0.16, 0.05))
    main = walls.minimum(towers).minimum(keep).minimum(teeth)
    return [(main, MAIN), (roofs, GREY), (gate, WOOD), (slits, DARK)]


def duck(p: Points, shape: Tensor) -> list[Solid]:
    body = ellipsoid(p, (-0.1, 0.62, 0), (0.92, 0.58, 0.6))
    tail = ellipsoid(turn_z((p[0] + 0.9, p[1] - 0.95, p[2]), 35), (0, 0, 0), (0.16, 0.34, 0.26))
    head = sphere(p, (0.46, 1.46, 0), 0.42 + 0.04 * shape)
    neck = capsule(p, (0.4, 0.9, 0), (0.45, 1.35, 0), 0.26)
    main = blend(blend(body, neck, 0.2), blend(head, tail, 0.02), 0.12)
    wing = ellipsoid((p[0], p[1], p[2].abs()), (-0.2, 0.72, 0.52), (0.46, 0.28, 0.13))
    beak = ellipsoid(p, (0.95, 1.38, 0), (0.26, 0.1, 0.22))
    eyes = sphere((p[0], p[1], p[2].abs()), (0.66, 1.58, 0.32), 0.075)
    return [(main.minimum(wing), MAIN), (beak, WOOD), (eyes, DARK)]


def chair(p: Points, shape: Tensor) -> list[Solid]:
    x, y, z = p
    legs = box((x.abs(), y, z.abs()), (0.55, 0.42, 0.52), (0.1, 0.44, 0.1), 0.03)
    seat = box(p, (0, 0.92, 0), (0.7, 0.13, 0.68), 0.06)
    back = box(p, (0, 1.6, -0.56), (0.7, 0.6 + 0.08 * shape, 0.12), 0.08)
    cushion = box(p, (0, 1.09, 0.06), (0.56, 0.08, 0.54), 0.06)
    return [(seat.minimum(back), MAIN), (legs, WOOD), (cushion, CREAM)]


OBJECT_SHAPES: dict[str, ObjectShape] = {
    "house": house,
    "tree": tree,
    "mushroom": mushroom,
    "rocket": rocket,
    "snowman": snowman,
    "car": car,
    "boat": boat,
    "cactus": cactus,
    "mug": mug,
    "castle": castle,
    "duck": duck,
    "chair": chair,
}

# Five points per kind in object space, for the keypoint map: top, left, right, front, foot.
OBJECT_KEYPOINTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "house": ((0, 1.88, 0.75), (-1, 1.06, 0.75), (1, 1.06, 0.75), (0, 0.34, 0.67), (0, 0, 0.62)),
    "tree": ((0, 2.15, 0), (-0.9, 1.2, 0), (0.9, 1.15, 0), (0, 1.2, 0.6), (0, 0, 0.17)),
    "mushroom": ((0, 1.95, 0), (-1, 1.05, 0), (1, 1.05, 0), (0, 1.1, 0.98), (0, 0, 0.36)),
    "rocket": ((0, 2.2, 0), (-0.75, 0.1, 0), (0.75, 0.1, 0), (0, 1.3, 0.64), (0, 0.25, 0.3)),
    "snowman": ((0, 2.15, 0), (-0.9, 1.48, 0), (0.9, 1.48, 0), (0, 1.58, 0.58), (0, 0, 0)),
    "car": ((-0.08, 1.34, 0), (-1.12, 0.55, 0), (1.12, 0.55, 0), (0, 0.6, 0.5), (0, 0, 0)),
    "boat": ((0.05, 2.2, 0), (-1.1, 0.52, 0), (1.1, 0.52, 0), (0, 0.4, 0.48), (0, 0, 0)),
    "cactus": ((0, 2.08, 0), (-0.74, 1.8, 0), (0.76, 1.69, 0), (0, 1.2, 0.33), (0, 0, 0.5)),
    "mug": ((-0.15, 1.56, 0), (-0.85, 0.8, 0), (1.14, 0.8, 0), (-0.15, 0.8, 0.7), (-0.15, 0, 0)),
    "castle": ((0, 2.28, -0.15), (-0.78, 2.06, 0), (0.78, 2.06, 0), (0, 0.3, 0.45), (0, 0, 0.4)),
    "duck": ((0.46, 1.88, 0), (-1, 1.0, 0), (1.2, 1.38, 0), (0, 0.62, 0.6), (0, 0.05, 0)),
    "chair": ((0, 2.2, -0.56), (-0.7, 0.92, 0), (0.7, 0.92, 0), (0, 0.92, 0.68), (0, 0, 0.5)),
}
