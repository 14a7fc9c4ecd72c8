"""What the verbs share: how a verb is added, where it computes, and where output may go."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imprompt.cli.parsing import Parser
from imprompt.core.errors import ImpromptError

DTYPES = ("float32", "float16", "bfloat16")


def add_verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], None], *, about: str, examples: str
) -> Parser:
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


def add_place_arguments(parser: Any, dtype: str) -> None:
    """Where the base computes, and in which precision; `dtype` says what the default is."""
    add_device_argument(parser)
    parser.add_argument("--dtype", choices=DTYPES, help=f"precision of the base (default: {dtype})")


def add_device_argument(parser: Any, more: str = "") -> None:
    """Where it is computed; `more` goes on after the default in the help."""
    parser.add_argument(
        "--device", help=f"cpu, cuda, cuda:1, mps, … (default: a GPU, where there is one{more})"
    )


def add_base_arguments(parser: Any, *, denoises: bool = True) -> None:
    """Which base, and where it was made otherwise than its files say; `denoises` if texts are read and noise
    is predicted."""
    parser.add_argument("--base", default="diorama", help="diorama, a folder, a file or a hub id")
    parser.add_argument(
        "--base-config",
        type=Path,
        metavar="FOLDER",
        help="of a single file: the diffusers folder with its configuration and tokenizers (default: the "
        "hub's)",
    )
    if denoises:
        parser.add_argument(
            "--prediction-type",
            choices=("epsilon", "v_prediction", "sample"),
            help="what the base predicts, if its files do not say it",
        )
        parser.add_argument(
            "--clip-skip",
            type=int,
            default=1,
            metavar="LAYER",
            help="which layer of the text encoder is read, counted from the last (1; 2 for many fine-tunes of "
            "Stable Diffusion 1.5)",
        )


def base_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `load_base` is told of the base that a command line names."""
    return {
        "config": getattr(arguments, "base_config", None),
        "prediction_type": getattr(arguments, "prediction_type", None),
        "clip_skip": getattr(arguments, "clip_skip", 1),
    }


def load_placed_base(arguments: argparse.Namespace, *, half_on_gpu: bool = True) -> Any:
    """The base that a command line names, where it says, with the image encoder that it names.

    Without a word it goes to a GPU, where there is one, and there into half precision.

    Raises:
        ImpromptError: there is no such base, device or image encoder.
    """
    import torch

    from imprompt.bases import load_base
    from imprompt.bases.placement import default_device

    device = arguments.device or default_device()
    dtype = torch.float16 if half_on_gpu and str(device).startswith("cuda") else torch.float32
    if arguments.dtype is not None:
        dtype = getattr(torch, arguments.dtype)
    base = load_base(arguments.base, dtype=dtype, device=device, **base_options(arguments))
    if getattr(arguments, "image_encoder", None) is not None:
        from imprompt.encoders.clip import load_clip

        base.image_encoder = load_clip(arguments.image_encoder, base.dtype, base.device)
    return base


def add_image_encoder_argument(parser: Any) -> None:
    parser.add_argument(
        "--image-encoder",
        metavar="NAME[:SUBFOLDER]",
        help="folder or hub id of a CLIP vision model, such as h94/IP-Adapter:models/image_encoder "
        "(default: the base's own)",
    )


def new_picture(path: Path, *, overwrite: bool) -> Path:
    """A path to write a picture to, its folder made. Asked before the work, not after it.

    Raises:
        ImpromptError: its ending names no kind of picture, the file exists and `overwrite` is off,
            or the folder cannot be made.
    """
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ImpromptError(
            f"{path} ends with {path.suffix or 'nothing'!r}, which is no kind of picture that can be "
            "written: let it end with .png, .jpg or .webp."
        )
    if path.is_dir():
        raise ImpromptError(
            f"{path} is a folder; give the name of a picture, such as {path}/a.png."
        )
    if path.exists() and not overwrite:
        raise ImpromptError(f"{path} exists; choose another name or add --overwrite.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImpromptError(f"Cannot make the folder {path.parent}: {error.strerror}.") from error
    return path


def save_picture(
    picture: Any, path: Path, text: str | None = None, command: str | None = None
) -> None:
    """Write a PIL image to where `new_picture` said that it may go, a PNG with a `text` and a `command` in it.

    The text stands under "parameters", where other programs look for how a picture was made; the command that
    made it, whole, under "imprompt".

    Raises:
        ImpromptError: it cannot be written, for the disk is full, say.
    """
    from PIL.PngImagePlugin import PngInfo

    options = {}
    if text is not None and path.suffix.lower() == ".png":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("parameters", text)
        if command is not None:
            options["pnginfo"].add_itxt("imprompt", command)
    try:
        picture.save(path, **options)
    except OSError as error:
        raise ImpromptError(f"{path} was not written: {error.strerror or error}.") from error


def name_and_value(text: str, option: str, form: str) -> tuple[str, str]:
    """The two sides of an option's value of the form NAME=VALUE, which `form` writes in its own words.

    Raises:
        ImpromptError: it is not of this form.
    """
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ImpromptError(f"{option} {text!r} is not of the form {form}.")
    return name, value


def file_and_weight(value: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT apart; the weight is 1 if there is none.

    Raises:
        ImpromptError: the weight is not finite.
    """
    file, colon, text = value.rpartition(":")
    try:
        weight = float(text) if colon and file else None
    except ValueError:
        weight = None
    if weight is None:
        return value, 1.0
    if not math.isfinite(weight):
        raise ImpromptError(f"The weight in {value!r} is no finite number.")
    return file, weight
