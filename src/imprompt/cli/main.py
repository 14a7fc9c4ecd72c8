"""`imprompt`: reads the command line, runs a verb, tells mistakes in one line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

import imprompt
from imprompt.cli import convert, diorama, evaluate, generate, inspect, prepare, quickstart, train
from imprompt.cli.parsing import Parser
from imprompt.core.errors import ImpromptError

VERBS = (quickstart, generate, prepare, train, evaluate, inspect, convert, diorama)

EXAMPLES = """\
a first look:
  imprompt quickstart
a picture from a picture, with what comes with the package:
  imprompt generate --image photo.png
your own adapter:
  imprompt prepare photos/ data/
  imprompt train image-prompt --data data/ --output runs/first --preset diorama
  imprompt generate "as line art" --image photo.png --adapter runs/first/adapter.safetensors
"""


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="imprompt",
        description="Train, judge and run image-prompt adapters for diffusion models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"imprompt {imprompt.__version__}")
    parser.set_defaults(command=None)  # `main` knows the whole of it
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add_parser(verbs)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    wait_briefly_for_cores()
    try:
        parsed = create_parser().parse_args(arguments)
        parsed.command = shlex.join(
            ["imprompt", *(sys.argv[1:] if arguments is None else arguments)]
        )
        parsed.run(parsed)
    except ImpromptError as error:
        print(f"imprompt: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"imprompt: {interrupt or 'stopped'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    return 0


def wait_briefly_for_cores() -> None:
    """Let OpenMP's threads sleep soon when another process holds a core they wait for.

    By default they spin for milliseconds at every parallel region. Beside one busy process on two
    cores that made rendering a hundred times slower; spinning briefly costs nothing on an idle
    machine. Read by libgomp as torch loads it, so this must come before; a user's own setting stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "500")


if __name__ == "__main__":
    raise SystemExit(main())
