"""The options of `imprompt generate` that are about images and persons, and which of them were given."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from imprompt.cli.parsing import Once, number

ABOUT_IMAGES = (
    "adapter",
    "scale",
    "sweep",
    "instruction",
    "instruction_guidance_scale",
    "published_guidance",
    "merge",
    "image_weights",
    "crop",
    "negative_image",
    "mask",
    "start",
    "end",
    "over_time",
    "site_preset",
    "lora_scale",
    "shortcut_scale",
)
ABOUT_PERSONS = ("landmarks", "identity_mask", "identity_model", "identity_scale", "identity_net")
ABOUT_CONTROLS = ("control_start", "control_end", "control_mask")
ABOUT_INIT_IMAGE = ("init_mask", "strength")
ABOUT_EITHER = ("explain", "image_encoder", "image_guidance_scale", "face_encoder")


def add_identity_arguments(group: Any) -> None:
    group.add_argument(
        "--identity",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a picture of the person; may be repeated",
    )
    group.add_argument(
        "--landmarks",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="where the face shall be: JSON of five points, for each person (default: where it is in "
        "the picture)",
    )
    group.add_argument(
        "--identity-mask",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="where the person acts, for each: white there, black elsewhere; keeps several apart",
    )
    group.add_argument(
        "--identity-model",
        type=Path,
        action=Once,
        metavar="FOLDER",
        help="InstantID's folder, or what `imprompt train identity` made (default: the base's)",
    )
    group.add_argument("--identity-scale", type=number, help="λ of the face (1; 0.8 as published)")
    group.add_argument(
        "--identity-net", type=number, metavar="W", help="weight of IdentityNet (as λ)"
    )
    group.add_argument(
        "--face-encoder", help="diorama, insightface or a file (default: the adapter's own)"
    )


def add_init_image_arguments(group: Any) -> None:
    group.add_argument(
        "--init-image", type=Path, action=Once, metavar="FILE",
        help="begin from this picture instead of noise (its middle, in the shape of what is drawn)",
    )  # fmt: skip
    group.add_argument(
        "--strength",
        type=number,
        help="how much of it may change: share of the steps that are drawn (0.8)",
    )
    group.add_argument(
        "--init-mask",
        type=Path,
        action=Once,
        metavar="FILE",
        help="a picture: where it is white, the other is drawn anew; where it is black, it stays",
    )


def add_image_arguments(group: Any) -> None:
    group.add_argument(
        "--instruction",
        action="append",
        default=[],
        metavar="TEXT",
        help='what to take from the image, for Instruct adapters: "use the style"; one for all '
        "images, or one for each",
    )
    group.add_argument(
        "--merge",
        choices=("concat", "mean", "norm mean", "sum", "difference"),
        help="make one prompt of several images (default: each is a prompt of its own)",
    )
    group.add_argument(
        "--image-weights", type=number, nargs="+", metavar="W", help="of the merged images"
    )
    group.add_argument(
        "--crop",
        choices=("center", "pad", "stretch", "tiles"),
        help="what is seen of an image that is not square (center)",
    )
    group.add_argument(
        "--negative-image", type=Path, action=Once, help="a picture to get away from"
    )
    group.add_argument(
        "--mask", type=Path, action=Once, help="a picture: images act where it is white"
    )
    group.add_argument("--start", type=number, help="fraction of the steps (0)")
    group.add_argument("--end", type=number, help="fraction of the steps (1)")
    group.add_argument(
        "--over-time", type=number, nargs="+", metavar="F",
        help="factors on λ from start to end, interpolated: 1 0 fades the images out",
    )  # fmt: skip
    group.add_argument(
        "--site-preset", help='where in the UNet λ counts: style, composition, "ease in", …'
    )
    group.add_argument("--lora-scale", type=number, help="weight of a face-id adapter's LoRA (1.0)")
    group.add_argument(
        "--shortcut-scale",
        type=number,
        help="looks of a face, for face-id-plus v2 (1.0)",
    )


def given(arguments: argparse.Namespace, *names: str, **renamed: str) -> dict[str, Any]:
    """The options that the command line names, by their own names or as they are `renamed`.

    Those it does not name have no value: their defaults are those of what they are given to.
    """
    options = {name: name for name in names} | renamed
    values = {name: getattr(arguments, option) for name, option in options.items()}
    return {
        name: value
        for name, value in values.items()
        if value is not None and value is not False and value != []
    }


def adapter_path(arguments: argparse.Namespace) -> Path | None:
    """The adapter that a command names, or else what comes with its base; None if nothing does."""
    if arguments.adapter is not None or arguments.base != "diorama":
        return arguments.adapter
    return Path("diorama-instruct" if arguments.instruction else "diorama")
