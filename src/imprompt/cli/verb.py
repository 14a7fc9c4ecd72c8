"""What the verbs share: how a verb is added, and where output may go."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imprompt.core.errors import ImpromptError


def add_verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], None], *, about: str, examples: str
) -> argparse.ArgumentParser:
    """A sub-command whose help ends with examples."""
    parser = verbs.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def new_file(path: Path, *, overwrite: bool) -> Path:
    """A path to write a file to, its folder made.

    Raises:
        ImpromptError: the file exists and `overwrite` is off, or the folder cannot be made.
    """
    if path.exists() and not overwrite:
        raise ImpromptError(f"{path} exists; choose another name or add --overwrite.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImpromptError(f"Cannot make the folder {path.parent}: {error.strerror}.") from error
    return path


def name_and_value(text: str, option: str) -> tuple[str, str]:
    """The two sides of NAME=VALUE.

    Raises:
        ImpromptError: it is not of this form.
    """
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ImpromptError(f"{option} {text!r} is not of the form NAME=VALUE.")
    return name, value
