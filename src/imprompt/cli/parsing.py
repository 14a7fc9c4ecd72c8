"""How a command line is read: mistakes in one line, numbers in their ranges, nothing replaced in silence."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from imprompt.core.errors import ImpromptError

OPTION = re.compile(r"--?[A-Za-z][^\s=]*")


class Parser(argparse.ArgumentParser):
    """A parser that tells every mistake as an ImpromptError of one line."""

    stands_alone = ""
    """What is given without an option, where that may be forgotten: its name."""

    def error(self, message: str) -> NoReturn:
        if re.match("unrecognized arguments: [^-]", message):
            message += "; a text of several words stands in quotes"
        raise ImpromptError(f"{message} (see `{self.prog} --help`)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Looked for first: an option that is misspelt is often also one that is missing.
        if args is not None and self._subparsers is None:
            self._check_options(args)
        return super().parse_known_args(args, namespace)

    def _check_options(self, args: Sequence[str]) -> None:
        known = self._option_string_actions
        for text in args:
            if text == "--":
                return
            name = text.partition("=")[0]
            if name == f"--{self.stands_alone}":
                self.error(f"The {self.stands_alone} stands without an option, in quotes")
            if OPTION.fullmatch(name) and not any(option.startswith(name) for option in known):
                close = difflib.get_close_matches(f"--{name.lstrip('-')}", known, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                self.error(f"There is no option {name}{hint}")


class Once(argparse.Action):
    """An option of which a second one would silently replace the first."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} was given twice, and can be given once")
        setattr(namespace, self.dest, values)


def number(text: str) -> float:
    """The type of an argument that is a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number")
    return value


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number, `least` or more."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} was given, but must be at least {least}")
        return value

    return whole_number
