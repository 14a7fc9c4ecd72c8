"""Does what is generated obey the map that was asked for? Measured on unseen scenes of the embedded world.

The text tells object, colour, style and setting, the map what the text does not tell: place, size, turn
and proportions. Without a control these are the base's own choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from imprompt.adapters import ImagePromptAdapter
from imprompt.bases import Base
from imprompt.checkpoints import LoadedControl
from imprompt.diorama import (
    OBJECT_KINDS,
    STYLES,
    Render,
    Scene,
    caption,
    draw_maps,
    render,
    sample_scene,
)
from imprompt.diorama.held_out import UNSEEN_SCENES
from imprompt.diorama.vocabulary import COLOURS
from imprompt.evaluation.judge import read, truth
from imprompt.evaluation.map_reader import compare, read_maps
from imprompt.evaluation.measure import Sampling, draw, prompt_of_pictures, unseen_scenes
from imprompt.generation.controls import MapControl, placed
from imprompt.systems.classifier import Judge
from imprompt.systems.map_reader import MapReader

FIRST = 30_000


@dataclass(frozen=True)
class ControlRow:
    """One way of generating, the pictures, and how well they obey.

    `figures` also has the shares of pictures that show the wanted object and the wanted look (style
    and colour).
    """

    name: str
    images: Tensor
    figures: dict[str, float]


def measure_controls(
    base: Base,
    controls: Mapping[str, LoadedControl],
    reader: MapReader,
    judge: Judge,
    sampling: Sampling,
    *,
    count: int = 48,
    weights: Sequence[int | float] = (1.0, 2.0),
    adapter: ImagePromptAdapter | None = None,
    image_scale: int | float = 1.0,
) -> tuple[list[Scene], Render, list[ControlRow]]:
    """Rows: the renders themselves, no control, each control at each weight, all controls together;
    with an adapter also an image prompt alone and together with all controls.

    `controls` are by kind of map. The image prompt shows another object in another style and colour;
    the text then only names the object.
    """
    networks = {kind: placed(control.module, base) for kind, control in controls.items()}
    scenes = unseen_scenes(count, first=FIRST)
    asked = render(scenes, base.image_size_px)
    wanted = truth(scenes)
    maps = {kind: draw_maps(asked, kind) for kind in controls}
    texts = [caption(scene) for scene in scenes]

    def row(name: str, images: Tensor, look: Mapping[str, Tensor]) -> ControlRow:
        found = read(judge, images)
        figures = compare(read_maps(reader, images), asked)
        figures["object"] = (found["kind"] == wanted["kind"]).float().mean().item()
        kept = (found["style"] == look["style"]) & (found["colour"] == look["colour"])
        figures["look"] = kept.float().mean().item()
        return ControlRow(name, images, figures)

    def use(kind: str, weight: int | float) -> MapControl:
        return MapControl(module=networks[kind], maps=maps[kind], weight=weight)

    rows = [
        row("the renders themselves", asked.pixels, wanted),
        row("no control", draw(base, texts, (), sampling), wanted),
    ]
    for kind in controls:
        for weight in weights:
            images = draw(base, texts, (), sampling, controls=[use(kind, weight)])
            rows.append(row(f"{kind}, ω = {weight:g}", images, wanted))
    everything = [use(kind, 1.0) for kind in controls]
    together = " and ".join(controls)
    if len(controls) > 1:
        rows.append(row(together, draw(base, texts, (), sampling, controls=everything), wanted))
    if adapter is not None:
        references = unlike(scenes)
        look = truth(references)
        short = [f"a {scene.kind}" for scene in scenes]
        with adapter.install(base.unet) as handle:
            pixels = render(references, base.image_size_px).pixels
            prompt = prompt_of_pictures(base, adapter, handle, pixels, image_scale)
            alone = draw(base, short, [prompt], sampling)
            all_of_them = draw(base, short, [prompt], sampling, controls=everything)
        rows.append(row("image prompt", alone, look))
        rows.append(row(f"{together} and image prompt", all_of_them, look))
    return scenes, asked, rows


def unlike(scenes: Sequence[Scene]) -> list[Scene]:
    """For each scene one of another object in another style and colour."""
    return [
        sample_scene(
            UNSEEN_SCENES[FIRST + 10_000 + i],
            kind=_other(OBJECT_KINDS, scene.kind, 5),
            colour=_other(tuple(COLOURS), scene.colour, 3),
            style=_other(STYLES, scene.style, 1 + i % (len(STYLES) - 1)),
        )
        for i, scene in enumerate(scenes)
    ]


def _other(names: Sequence[str], name: str, steps: int) -> str:
    return names[(names.index(name) + steps) % len(names)]


def table(rows: Sequence[ControlRow]) -> str:
    """The rows as a Markdown table."""
    percent = ("edge F1", "segmentation IoU", "object IoU", "object", "look")
    names = list(rows[0].figures)
    lines = [
        "| | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for one in rows:
        cells = [
            f"{100 * one.figures[name]:.1f} %" if name in percent else f"{one.figures[name]:.1f}"
            for name in names
        ]
        lines.append(f"| {one.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
