"""`imprompt train`: any system, on prepared data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from imprompt.cli.parsing import at_least
from imprompt.cli.verb import (
    add_base_arguments,
    add_device_argument,
    add_image_encoder_argument,
    add_verb,
    base_options,
)
from imprompt.systems.catalogue import TRAINABLES


class _ShowSettings(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        from imprompt.core.errors import ImpromptError
        from imprompt.training.settings import describe_settings

        try:
            print(describe_settings(values))
        except ImpromptError as error:
            parser.exit(2, f"imprompt: error: {error}\n")
        parser.exit()


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "train",
        run,
        about="train a system on prepared data or on pairs as they are; the same command again resumes",
        examples="  imprompt train image-prompt --data data/ --output runs/first \\\n"
        "      --preset diorama --set train.steps=2000\n"
        "  imprompt train image-prompt --data sd15-data/ --base models/sd15 --output runs/sd15 \\\n"
        "      --preset image-prompt\n"
        "  imprompt train controlnet --data data/ --output runs/depth --preset diorama \\\n"
        "      --set system.kind=depth\n"
        "  imprompt train --settings controlnet\n"
        "  torchrun --nproc_per_node 8 -m imprompt train image-prompt … --engine zero2 --processes 8",
    )
    parser.add_argument(
        "system",
        help=", ".join(TRAINABLES),
    )
    parser.add_argument(
        "--settings",
        action=_ShowSettings,
        metavar="SYSTEM",
        help="list all that can be set of a system, and end",
    )
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        help="what `imprompt prepare` made (several folders are joined), or a source that it reads, "
        "encoded anew at every step",
    )
    parser.add_argument("--size-px", type=at_least(1), help="of a source: side of the images")
    parser.add_argument(
        "--image-root",
        type=Path,
        metavar="FOLDER",
        help="of a list: what its paths are relative to",
    )
    parser.add_argument("--image-key", metavar="NAME", help="of a list: the column of the paths")
    parser.add_argument(
        "--caption-key", metavar="NAME", help="of a list: the column of the captions"
    )
    parser.add_argument(
        "--face-encoder",
        help="of a source: who reads identity vectors: diorama, insightface[:MODEL], or a file (default: "
        "diorama for its own portraits, insightface for photos)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of this run")
    add_base_arguments(parser)
    add_image_encoder_argument(parser)
    add_device_argument(parser, "; of several processes each takes its own")
    parser.add_argument(
        "--preset",
        help="name of a preset (diorama is the system's own on the embedded base), or a TOML file",
    )
    parser.add_argument(
        "--engine",
        default="auto",
        help="single, ddp, zero2 or fsdp2; auto is ddp where torchrun started several processes",
    )
    parser.add_argument(
        "--processes", type=int, metavar="COUNT", help="how many processes there must be"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=value",
        help="change one setting, such as train.steps=500 or system.variant=plus; may be repeated",
    )


def run(arguments: argparse.Namespace) -> None:
    from imprompt.data.records import Reading
    from imprompt.evaluation.previews import preview_of
    from imprompt.training.run import run_training

    export = run_training(
        arguments.system,
        data=arguments.data,
        base=arguments.base,
        base_options=base_options(arguments),
        image_encoder=arguments.image_encoder,
        output=arguments.output,
        preset=arguments.preset,
        settings=arguments.set,
        engine=arguments.engine,
        num_processes=arguments.processes,
        device=arguments.device,
        preview_of=preview_of,
        size_px=arguments.size_px,
        face_encoder=arguments.face_encoder,
        reading=Reading(
            image_root=arguments.image_root,
            image_key=arguments.image_key,
            caption_key=arguments.caption_key,
        ),
    )
    print(f"trained: {export}")
