"""A scene of the diorama world: everything that decides a picture, as a pure function of a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import generator
from imprompt.diorama import vocabulary as words


@dataclass(frozen=True, kw_only=True)
class Character:
    """The identity of a person: eight factors that stay the same in every pose, light and style."""

    face_shape: str
    skin: str
    hair_shape: str
    hair_colour: str
    eyes: str
    glasses: str
    nose: str
    beard: str


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture's content.

    `turn_degrees` rotates the object about the vertical axis, `camera_degrees` is the camera's
    elevation above the horizon, `light_degrees` the light's azimuth seen from the camera.
    `shape` in [0, 1] varies the object's proportions. `character` is set for persons only.
    """

    seed: int
    kind: str
    colour: str
    style: str
    setting: str
    placement: str
    size: str
    camera: str
    turn_degrees: float
    camera_degrees: float
    light_degrees: float
    zoom: float
    offset: float
    shape: float
    character: Character | None = None


def sample_character(seed: int) -> Character:
    """Draw an identity; the same seed is the same person."""
    random = generator(seed, 0, "diorama.character")

    def pick(choices: tuple[str, ...] | dict[str, tuple[float, float, float]]) -> str:
        return list(choices)[int(random.integers(len(choices)))]

    return Character(
        face_shape=pick(words.FACE_SHAPES),
        skin=pick(words.SKIN_TONES),
        hair_shape=pick(words.HAIR_SHAPES),
        hair_colour=pick(words.HAIR_COLOURS),
        eyes=pick(words.EYE_COLOURS),
        glasses=pick(words.GLASSES),
        nose=pick(words.NOSES),
        beard=pick(words.BEARDS),
    )


def sample_scene(seed: int, **fixed: object) -> Scene:
    """Draw a scene; keyword arguments fix single fields, all others stay as the seed has them.

    Persons appear in one scene of thirteen, like every other kind. `character` may be given as a
    `Character`; without it a person's identity follows from the seed.

    Raises:
        ImpromptError: a fixed field does not exist or its value is not a word of the world.
    """
    random = generator(seed, 0, "diorama.scene")

    def pick(choices: tuple[str, ...]) -> str:
        return choices[int(random.integers(len(choices)))]

    kind = pick(words.KINDS)
    scene = Scene(
        seed=seed,
        kind=kind,
        colour=pick(tuple(words.COLOURS)),
        style=pick(words.STYLES),
        setting=pick(words.SETTINGS),
        placement=pick(words.PLACEMENTS),
        size=pick(words.SIZES),
        camera=pick(words.CAMERAS),
        turn_degrees=float(random.uniform(-40.0, 40.0)),
        camera_degrees=0.0,
        light_degrees=float(random.choice([-1.0, 1.0]) * random.uniform(25.0, 65.0)),
        zoom=0.0,
        offset=0.0,
        shape=float(random.uniform(0.0, 1.0)),
    )
    scene = _with_fixed_fields(scene, fixed)
    return _with_framing(scene, random, fixed)


def _with_fixed_fields(scene: Scene, fixed: dict[str, object]) -> Scene:
    allowed = {
        "kind": words.KINDS,
        "colour": tuple(words.COLOURS),
        "style": words.STYLES,
        "setting": words.SETTINGS,
        "placement": words.PLACEMENTS,
        "size": words.SIZES,
        "camera": words.CAMERAS,
    }
    for name, value in fixed.items():
        if name not in Scene.__dataclass_fields__ or name == "seed":
            raise ImpromptError(
                f"a scene has no field {name!r}; it has {', '.join(Scene.__dataclass_fields__)}"
            )
        if name in allowed and value not in allowed[name]:
            raise ImpromptError(
                f"{value!r} is not a {name} of the diorama world; choose one of: "
                + ", ".join(allowed[name])
            )
    return replace(scene, **fixed)  # type: ignore[arg-type]


def _with_framing(scene: Scene, random: np.random.Generator, fixed: dict[str, object]) -> Scene:
    """Turn the words for placement, size and camera into numbers, each within its word's range."""
    jitter = random.uniform(-1.0, 1.0, size=3)
    is_person = scene.kind == words.PERSON
    values: dict[str, Any] = {
        "camera_degrees": {"low": 8.0, "high": 27.0}[scene.camera] + 4.0 * float(jitter[0]),
        "zoom": {"small": 0.84, "large": 1.06}[scene.size] + 0.05 * float(jitter[1]),
        "offset": {"left": -0.19, "center": 0.0, "right": 0.19}[scene.placement]
        + 0.04 * float(jitter[2]),
    }
    if is_person:
        values["camera_degrees"] = {"low": -4.0, "high": 10.0}[scene.camera] + 4.0 * float(
            jitter[0]
        )
        values["zoom"] = 0.92 * float(values["zoom"])  # room for hair
        values["character"] = scene.character or sample_character(scene.seed)
    elif scene.character is not None:
        raise ImpromptError(f"a {scene.kind} has no character; only kind='person' does")
    values.update({name: fixed[name] for name in values if name in fixed})
    if is_person and values["character"] is None:
        values["character"] = sample_character(scene.seed)
    return replace(scene, **values)  # type: ignore[arg-type]
