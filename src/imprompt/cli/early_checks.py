"""What is wrong with a command line of `imprompt generate` by itself: files that are not there, options
that nothing would read. Nothing heavy is imported for it, so that it is told at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from imprompt.cli.image_options import (
    ABOUT_CONTROLS,
    ABOUT_EITHER,
    ABOUT_IMAGES,
    ABOUT_INIT_IMAGE,
    ABOUT_PERSONS,
    given,
)
from imprompt.cli.verb import file_and_weight, name_and_value
from imprompt.core.errors import ImpromptError
from imprompt.core.hub import is_file_on_hub, is_on_hub
from imprompt.core.shipped import ADAPTERS, CONTROLS, IDENTITIES


def check_command(arguments: argparse.Namespace) -> None:
    """Raise an ImpromptError for the first mistake that shows in the words of the command alone."""
    check_is_used(arguments)
    check_files(arguments)


def check_is_used(arguments: argparse.Namespace) -> None:
    """Raise an ImpromptError if something was given that nothing would read."""
    has_image, has_person = bool(arguments.image), bool(arguments.identity)
    for names, is_read, reason in (
        (ABOUT_IMAGES, has_image, "images, but no --image was given"),
        (ABOUT_PERSONS, has_person, "a person, but no --identity was given"),
        (ABOUT_CONTROLS, bool(arguments.control), "controls, but no --control was given"),
        (
            ABOUT_INIT_IMAGE,
            arguments.init_image is not None,
            "a picture to begin from, but no --init-image was given",
        ),
        (ABOUT_EITHER, has_image or has_person, "images, but no --image (or --identity) was given"),
    ):
        unread = {} if is_read else given(arguments, *names)
        if unread:
            raise ImpromptError(f"{_option(next(iter(unread)))} is about {reason}.")
    if arguments.sweep and arguments.scale is not None:
        raise ImpromptError("--sweep names all weights of the images: leave --scale out.")
    if arguments.sweep and arguments.explain is not None:
        raise ImpromptError("--explain looks at one weight: give --scale instead of --sweep.")
    if arguments.size_px is not None and len(arguments.size_px) > 2:
        raise ImpromptError("--size-px takes one side, or height and width.")
    for name in ("landmarks", "identity_mask"):
        count = len(getattr(arguments, name))
        if count not in (0, len(arguments.identity)):
            raise ImpromptError(
                f"{count} {_option(name)} were given for {len(arguments.identity)} --identity: give one for "
                "each, or none."
            )
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
    models = [
        name_and_value(text, "--control-model", "KIND=FOLDER") for text in arguments.control_model
    ]
    images = [*arguments.image, arguments.negative_image, arguments.mask, *arguments.identity]
    images += [arguments.init_image, arguments.init_mask]
    images += [arguments.control_mask, *arguments.identity_mask]
    check_exist("image file", [*images, *(file_and_weight(value)[0] for _, value in controls)])
    check_exist("adapter", [arguments.adapter], ADAPTERS, elsewhere=is_file_on_hub)
    check_exist("identity model", [arguments.identity_model], IDENTITIES, elsewhere=is_on_hub)
    check_exist("control model", [folder for _, folder in models], CONTROLS, elsewhere=is_on_hub)
    check_exist("LoRA", [file_and_weight(text)[0] for text in arguments.lora])
    check_exist("textual inversion", arguments.textual_inversion)
    check_exist("file of landmarks", arguments.landmarks)


def check_exist(
    what: str,
    paths: Iterable[str | Path | None],
    names: Iterable[str] = (),
    *,
    elsewhere: Callable[[str | Path], bool] = lambda path: False,
) -> None:
    """Raise an ImpromptError for the first that is not there, none of these `names` either, nor `elsewhere`."""
    for path in paths:
        if path is None or str(path) in names or Path(path).exists() or elsewhere(path):
            continue
        shipped = f"; {', '.join(names)} come with the package" if names else ""
        raise ImpromptError(f"There is no {what} {path}{shipped}.")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
