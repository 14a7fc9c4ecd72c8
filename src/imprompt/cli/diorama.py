"""`imprompt diorama`: a contact sheet of the embedded world."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from imprompt.cli.parsing import at_least
from imprompt.cli.verb import add_verb, new_picture, save_picture

FILTERS = ("kind", "colour", "style", "setting", "placement", "size", "camera")


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "diorama",
        run,
        about="draw scenes of the embedded world",
        examples="  imprompt diorama --grid scenes.png\n"
        '  imprompt diorama --grid houses.png --kind house --style "line art" --size-px 128\n'
        "  imprompt diorama --grid depth.png --count 1 --seed 7 --map depth",
    )
    parser.add_argument(
        "--grid", type=Path, required=True, metavar="FILE", help="the sheet to write"
    )
    parser.add_argument(
        "--count", type=at_least(1), default=48, help="how many scenes (default: 48)"
    )
    parser.add_argument(
        "--columns", type=at_least(1), default=12, help="scenes per row (default: 12)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first scene's seed")
    parser.add_argument(
        "--size-px", type=at_least(1), default=64, help="side of a scene (default: 64)"
    )
    parser.add_argument(
        "--map",
        metavar="KIND",
        help="draw control maps instead: depth, edges, segmentation or keypoints",
    )
    parser.add_argument("--captions", action="store_true", help="print each scene's caption")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    for name in FILTERS:
        parser.add_argument(f"--{name}", help=f"only scenes of this {name}")


def run(arguments: argparse.Namespace) -> None:
    from imprompt.core.images import image_grid, pixels_to_images
    from imprompt.core.progress import progress
    from imprompt.diorama import caption, draw_maps, render, sample_scene

    output = new_picture(arguments.grid, overwrite=arguments.overwrite)
    fixed = {n: getattr(arguments, n) for n in FILTERS if getattr(arguments, n) is not None}
    scenes = [sample_scene(arguments.seed + i, **fixed) for i in range(arguments.count)]
    images = []
    with progress(len(scenes), "drawing", unit="scene") as bar:
        for start in range(0, len(scenes), 24):
            part = scenes[start : start + 24]
            drawn = render(part, arguments.size_px)
            maps = None if arguments.map is None else draw_maps(drawn, arguments.map)
            images += pixels_to_images(drawn.pixels if maps is None else maps * 2 - 1)
            bar.update(len(part))
    save_picture(image_grid(images, min(arguments.columns, len(images))), output)
    if arguments.captions:
        for scene in scenes:
            print(f"{scene.seed}\t{caption(scene)}")
    print(f"{len(images)} scene{'s' if len(images) > 1 else ''} in {output}")
