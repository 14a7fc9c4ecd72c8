"""`imprompt quickstart`: everything once, with a report to look at."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from imprompt.cli.verb import add_verb


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "quickstart",
        run,
        about="train and use an image-prompt adapter on the embedded base; writes report.html",
        examples="  imprompt quickstart\n  imprompt quickstart --output elsewhere/",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("imprompt-quickstart"),
        help="folder for everything made",
    )
    parser.add_argument("--num-pairs", type=int, default=3200, help="scenes to train on (3200)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", help="as for `imprompt train`"
    )


def run(arguments: argparse.Namespace) -> None:
    from imprompt.evaluation.quickstart import quickstart

    quickstart(arguments.output, num_pairs=arguments.num_pairs, settings=arguments.set)
