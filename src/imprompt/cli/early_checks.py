"""What is wrong with a command line of `imprompt generate` by itself: files that are not there, options
that nothing would read. Nothing heavy is imported for it, so that it is told at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from imprompt.cli.image_options import ABOUT_EITHER, ABOUT_IMAGES, ABOUT_PERSONS, given
from imprompt.cli.verb import file_and_weight, name_and_value
from imprompt.core.errors import ImpromptError


def check_command(arguments: argparse.Namespace) -> None:
    """Raise an ImpromptError for the first mistake that shows in the words of the command alone."""
    check_is_used(arguments)
    check_files(arguments)


def check_is_used(arguments: argparse.Namespace) -> None:
    """Raise an ImpromptError if something was given that nothing would read."""
    has_image, has_person = bool(arguments.image), arguments.identity is not None
    for names, is_read, reason in (
        (ABOUT_IMAGES, has_image, "images, but no --image was given"),
        (ABOUT_PERSONS, has_person, "a person, but no --identity was given"),
        (ABOUT_EITHER, has_image or has_person, "images, but no --image (or --identity) was given"),
    ):
        unread = {} if is_read else given(arguments, *names)
        if unread:
            raise ImpromptError(f"{_option(next(iter(unread)))} is about {reason}.")
    others = given(
        arguments, "guidance_scale", "image_guidance_scale", "instruction_guidance_scale"
    )
    if arguments.published_guidance and others:
        raise ImpromptError(
            "--published-guidance sets all strengths of guidance: leave it or "
            f"{_option(next(iter(others)))} out."
        )


def check_files(arguments: argparse.Namespace) -> None:
    """Raise an ImpromptError if a file or folder is not there."""
    controls = [name_and_value(text, "--control", "KIND=FILE") for text in arguments.control]
    images = [*arguments.image, arguments.negative_image, arguments.mask, arguments.identity]
    check_exist("image file", [*images, *(file_and_weight(value)[0] for _, value in controls)])
    check_exist("LoRA", [file_and_weight(text)[0] for text in arguments.lora])
    check_exist("textual inversion", arguments.textual_inversion)
    check_exist("file of landmarks", [arguments.landmarks])


def check_exist(what: str, paths: Iterable[str | Path | None]) -> None:
    """Raise an ImpromptError for the first that is not there."""
    for path in paths:
        if path is not None and not Path(path).exists():
            raise ImpromptError(f"There is no {what} {path}.")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
