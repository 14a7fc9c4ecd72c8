"""Persons: a head and shoulders whose identity is a `Character`, with exact facial landmarks.

Factors enter as per-point tensors (0/1 switches and sizes), so that different persons share a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imprompt.diorama.primitives import (
    Points,
    blend,
    box,
    capsule,
    carve,
    cylinder,
    ellipsoid,
    mirror_x,
    sphere,
    torus,
)
from imprompt.diorama.scene import Character
from imprompt.diorama.vocabulary import DARK, EYE, HAIR, LIP, MAIN, SKIN

_FAR = 9.0  # an absent part is this far away
_EYE = (0.24, 1.36, 0.56)
_MOUTH = (0.17, 0.9, 0.56)
_NOSE_TIP = (0.0, 1.15, 0.76)


@dataclass(frozen=True)
class FaceNumbers:
    """A character's factors as numbers; every field broadcasts over the points of a batch."""

    width: Tensor
    height: Tensor
    square: Tensor
    short: Tensor
    long: Tensor
    curly: Tensor
    bun: Tensor
    spiky: Tensor
    round_glasses: Tensor
    square_glasses: Tensor
    nose: Tensor
    beard: Tensor


def face_numbers(characters: list[Character]) -> FaceNumbers:
    """Turn identities into one tensor of shape (batch,) per factor."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    def switch(name: str, value: str) -> Tensor:
        return column([float(getattr(character, name) == value) for character in characters])

    sizes = {"round": (0.66, 0.7), "long": (0.56, 0.8), "square": (0.62, 0.72)}
    return FaceNumbers(
        width=column([sizes[character.face_shape][0] for character in characters]),
        height=column([sizes[character.face_shape][1] for character in characters]),
        square=switch("face_shape", "square"),
        short=switch("hair_shape", "short"),
        long=switch("hair_shape", "long"),
        curly=switch("hair_shape", "curly"),
        bun=switch("hair_shape", "bun"),
        spiky=switch("hair_shape", "spiky"),
        round_glasses=switch("glasses", "round"),
        square_glasses=switch("glasses", "square"),
        nose=column([0.09 if character.nose == "small" else 0.15 for character in characters]),
        beard=switch("beard", "full"),
    )


def _only_if(distance: Tensor, present: Tensor) -> Tensor:
    return distance + (1.0 - present) * _FAR


def person(p: Points, face: FaceNumbers) -> list[tuple[Tensor, int]]:
    """The solids of a bust whose face looks along +z; `face` holds one number per point."""
    _x, y, z = p
    side = mirror_x(p)
    head = ellipsoid(p, (0, 1.2, 0), (face.width, face.height, 0.64))
    jaw = box(p, (0, 0.98, 0.08), (0.5, 0.42, 0.46), 0.2)
    head = head.minimum(_only_if(jaw, face.square))
    head = blend(head, cylinder(p, (0, 0.4, -0.05), 0.25, 0.35), 0.1)
    ears = ellipsoid((side[0] - face.width, y, z), (0.0, 1.18, 0), (0.1, 0.17, 0.1))
    nose = ellipsoid(p, (0, 1.15, 0.64), (face.nose, face.nose * 1.35, face.nose * 1.1))
    shirt = blend(
        ellipsoid(p, (0, -0.12, -0.05), (1.05, 0.52, 0.6)),
        cylinder(p, (0, 0.18, -0.05), 0.36, 0.16),
        0.12,
    )
    eyes = ellipsoid(side, (_EYE[0], _EYE[1], _EYE[2]), (0.095, 0.1, 0.07))
    brows = capsule(side, (0.14, 1.56, 0.53), (0.36, 1.54, 0.46), 0.035)
    mouth = ellipsoid(p, (0, 0.9, 0.565), (0.19, 0.055, 0.08))
    beard = carve(
        ellipsoid(p, (0, 0.92, 0.06), (face.width + 0.03, 0.56, 0.66)),
        ellipsoid(p, (0, 1.24, 0.66), (0.5, 0.3, 0.5)),
    )
    beard = torch.maximum(beard, y - 1.16)
    solids: list[tuple[Tensor, int]] = [
        (torch.minimum(head, ears).minimum(nose), SKIN),
        (shirt, MAIN),
        (eyes, EYE),
        (mouth, LIP),
        (brows.minimum(_hair(p, face)).minimum(_only_if(beard, face.beard)), HAIR),
        (_glasses(side, face), DARK),
    ]
    return solids


def _hair(p: Points, face: FaceNumbers) -> Tensor:
    """All hair shapes share a cap that leaves the face free."""
    x, y, z = p
    cap = ellipsoid(p, (0, 1.28, -0.06), (face.width + 0.09, face.height + 0.06, 0.7))
    cap = torch.maximum(cap, 1.2 - y + 0.0 * x)
    cap = torch.maximum(cap, (z - 0.34) + (1.62 - y))
    has_hair = face.short + face.long + face.curly + face.bun + face.spiky
    hair = _only_if(cap, has_hair)
    locks = ellipsoid(p, (0, 0.95, -0.18), (face.width + 0.2, 0.95, 0.52))
    locks = torch.maximum(locks, z - 0.12).maximum(0.2 - y)
    hair = hair.minimum(_only_if(locks, face.long))
    curls = sphere(p, (0, 1.98, 0.1), 0.36)
    for cx, cy, cz in ((0.45, 1.8, 0.12), (0.7, 1.4, -0.05), (0.3, 1.75, -0.45), (0.68, 1.0, -0.2)):
        curls = curls.minimum(sphere(mirror_x(p), (cx, cy, cz), 0.32))
    hair = hair.minimum(_only_if(curls, face.curly))
    knot = sphere(p, (0, 2.16, -0.1), 0.3)
    hair = hair.minimum(_only_if(knot, face.bun))
    spikes = capsule(p, (0, 1.8, 0.05), (0, 2.36, 0.12), 0.09)
    for sx, ex in ((0.22, 0.4), (0.42, 0.78)):
        spikes = spikes.minimum(
            capsule(mirror_x(p), (sx, 1.75, 0.05), (ex, 2.3 - 0.35 * ex, 0.08), 0.1)
        )
    return hair.minimum(_only_if(spikes, face.spiky))


def _glasses(side: Points, face: FaceNumbers) -> Tensor:
    _x, _y, _z = side
    rings = torus(side, (0.25, 1.35, 0.64), 0.19, 0.035)
    frame = carve(
        box(side, (0.26, 1.35, 0.64), (0.23, 0.18, 0.035)),
        box(side, (0.26, 1.35, 0.64), (0.165, 0.115, 0.2)),
    )
    bridge = box(side, (0, 1.37, 0.68), (0.08, 0.03, 0.03))
    either = face.round_glasses + face.square_glasses
    glasses = _only_if(rings, face.round_glasses).minimum(_only_if(frame, face.square_glasses))
    return glasses.minimum(_only_if(bridge, either))


def landmarks() -> Tensor:
    """The five landmarks in object space, shape (5, 3): left eye, right eye, nose, left and right
    mouth corner.

    "Left" is the viewer's left, as in the five points of face detectors.
    """
    return torch.tensor(
        [
            (-_EYE[0], _EYE[1], _EYE[2] + 0.07),
            (_EYE[0], _EYE[1], _EYE[2] + 0.07),
            _NOSE_TIP,
            (-_MOUTH[0], _MOUTH[1], _MOUTH[2] + 0.02),
            _MOUTH,
        ]
    )
