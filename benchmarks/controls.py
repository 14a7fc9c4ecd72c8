"""Measure controls on the embedded world, and draw what they do.

    python benchmarks/controls.py                          the shipped ones
    python benchmarks/controls.py --name more-controls --control edges=runs/edges/control \\
        --control keypoints=runs/keypoints/control --control depth=runs/depth/control

writes a table to benchmarks/results/NAME.md and into the documents, and a picture to docs/images/NAME.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pages import DOCS, RESULTS, publish
from PIL import Image

from imprompt.bases import load_base
from imprompt.checkpoints import load_adapter, load_control, shipped_controls
from imprompt.core.images import image_grid, pixels_to_images
from imprompt.core.shipped import ADAPTERS, shipped
from imprompt.diorama import draw_maps
from imprompt.evaluation.control import measure_controls, table
from imprompt.evaluation.judge import load_judge
from imprompt.evaluation.map_reader import load_map_reader
from imprompt.evaluation.measure import Sampling

NOT_SHOWN = "ω = 2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--control", action="append", default=[], metavar="KIND=FOLDER")
    parser.add_argument("--map-reader", type=Path, help="another than the shipped one")
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", default="dpm-solver++")
    parser.add_argument("--guidance-scale", type=float, help="the base's own if not given")
    parser.add_argument("--shown", type=int, default=10, help="scenes in the picture")
    parser.add_argument("--name", default="controls", help="of table and picture in the documents")
    arguments = parser.parse_args()
    folders = dict(text.split("=", 1) for text in arguments.control) or shipped_controls()
    base = load_base("diorama")
    _, asked, rows = measure_controls(
        base,
        {kind: load_control(folder) for kind, folder in folders.items()},
        load_map_reader(arguments.map_reader),
        load_judge(),
        Sampling(
            steps=arguments.steps,
            sampler=arguments.sampler,
            guidance_scale=arguments.guidance_scale,
        ),
        count=arguments.count,
        weights=arguments.weights,
        adapter=load_adapter(shipped(ADAPTERS["diorama"])),
    )
    (RESULTS / f"{arguments.name}.md").write_text(table(rows) + "\n", encoding="utf-8")
    publish(DOCS / "controls.md", arguments.name, table(rows) + "\n")
    print(table(rows))
    pictures = {f"{kind} map": draw_maps(asked, kind) * 2 - 1 for kind in folders}
    pictures |= {row.name: row.images for row in rows if not row.name.endswith(NOT_SHOWN)}
    labelled_rows(
        {name: pixels_to_images(x[: arguments.shown]) for name, x in pictures.items()}
    ).save(DOCS / "images" / f"{arguments.name}.png")


def labelled_rows(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """A sheet with a row for each name, which stands below the row's first picture."""
    cells: list[Image.Image] = []
    labels: list[str] = []
    for name, images in rows.items():
        cells += [image.resize((112, 112), Image.Resampling.NEAREST) for image in images]
        labels += [name.replace("ω =", "weight"), *[""] * (len(images) - 1)]
    return image_grid(cells, len(cells) // len(rows), labels)


if __name__ == "__main__":
    main()
