"""`imprompt prepare`: pairs to cached features."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from imprompt.cli.verb import add_verb


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "prepare",
        run,
        about="encode pairs of images and captions once, for any number of trainings",
        examples="  imprompt prepare photos/ data/            images with .txt files of the same name\n"
        "  imprompt prepare pairs.json data/         a list of image_file and text\n"
        "  imprompt prepare diorama:3000 data/       scenes of the embedded world\n"
        "The same command again goes on where it stopped.",
    )
    parser.add_argument("source", help="folder, JSON list, or diorama:COUNT[:FIRST_SEED]")
    parser.add_argument("output", type=Path, help="folder of the prepared data")
    parser.add_argument("--base", default="diorama", help="diorama, a folder, a file or a hub id")
    parser.add_argument(
        "--variant",
        default="base",
        choices=("base", "plus", "full"),
        help="which adapter it is for",
    )
    parser.add_argument("--size-px", type=int, help="side of the images (default: the base's)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--columns", nargs="+", help="other columns than image prompts need (to train a base)"
    )


def run(arguments: argparse.Namespace) -> None:
    from imprompt.bases import load_base
    from imprompt.data.prepare import prepare

    prepare(
        arguments.source,
        arguments.output,
        load_base(arguments.base),
        columns=None if arguments.columns is None else tuple(arguments.columns),
        variant=arguments.variant,
        size_px=arguments.size_px,
        batch_size=arguments.batch_size,
    )
    print(f"prepared: {arguments.output}")
