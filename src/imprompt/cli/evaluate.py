"""`imprompt evaluate`: figures for the judge, the base, or an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from imprompt.cli.parsing import at_least, number
from imprompt.cli.verb import (
    add_base_arguments,
    add_image_encoder_argument,
    add_place_arguments,
    add_verb,
    load_placed_base,
    name_and_value,
)
from imprompt.core.errors import ImpromptError
from imprompt.core.progress import say
from imprompt.diffusion.samplers import SAMPLERS
from imprompt.evaluation.catalogue import MEASUREMENTS

# By a part of a figure's name; all others are shares.
UNITS = {
    "landmark error": "{:.2f} px",
    "keypoint error": "{:.2f} px",
    "depth error": "{:.1f} of 255",
    "parameters": "{:,.0f}",
    "CLIP-": "{:.3f}",
}


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "evaluate",
        run,
        about="measure an adapter (or the base, or the judge) on unseen scenes of the embedded world, or on "
        "pictures of one's own",
        examples="  imprompt evaluate runs/first/adapter.safetensors\n"
        "  imprompt evaluate --what base --count 500\n"
        "  imprompt evaluate --what judge --count 5000\n"
        "  imprompt evaluate --what ablation --output runs/ablation\n"
        "  imprompt evaluate runs/person/identity --what identity --count 100\n"
        "  imprompt evaluate --what control --control-model depth=runs/depth/control --count 48\n"
        "  imprompt evaluate runs/instruct/adapter.safetensors --what instruct --count 48\n"
        "  imprompt evaluate --what instruct-table --output runs/instruct-table\n"
        "on any base, by the last pairs of a folder, archive or list:\n"
        "  imprompt evaluate runs/mine/adapter.safetensors --what pictures --data photos/ --count 64 \\\n"
        "      --base models/sd15 --clip openai/clip-vit-large-patch14 --scales 0 0.5 1",
    )
    parser.add_argument(
        "adapter",
        nargs="?",
        type=Path,
        help="file, also of face-id, or folder of an identity (the shipped one)",
    )
    parser.add_argument(
        "--what",
        default="adapter",
        choices=tuple(MEASUREMENTS),
        help="what is measured: an image-prompt adapter (the default), the base, the judge; two ways of "
        "joining tokens (ablation); a person kept; controls; Instruct, its comparison with rivals, or a map "
        "of its instructions; an adapter on pictures of one's own, by CLIP-I and CLIP-T",
    )
    add_base_arguments(parser)
    add_image_encoder_argument(parser)
    add_place_arguments(parser, "float32 on a CPU, float16 on a GPU")
    parser.add_argument("--count", type=at_least(1), default=96, help="how many images (96)")
    parser.add_argument("--steps", type=at_least(1), default=50, help="of the sampler (50)")
    parser.add_argument(
        "--sampler", default="ddim", choices=tuple(SAMPLERS), help="as for generate (ddim)"
    )
    parser.add_argument("--guidance-scale", type=number, help="the base's own if not given")
    parser.add_argument("--scale", type=number, default=1.0, help="λ for image prompts alone (1.0)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the noise; scenes stay the same (0)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of the ablation's runs, or of pictures (evaluations/WHAT)",
    )
    parser.add_argument(
        "--control-model",
        action="append",
        default=[],
        metavar="KIND=FOLDER",
        help="a control to measure, alone and with the others (default: those that are shipped)",
    )
    parser.add_argument(
        "--map-reader",
        type=Path,
        metavar="FILE",
        help="what `imprompt train map-reader` made, for --what control",
    )
    parser.add_argument(
        "--face-encoder",
        metavar="NAME",
        help="of an identity that was trained with one's own: the FILE.safetensors",
    )
    parser.add_argument(
        "--instructions",
        type=Path,
        metavar="FOLDER",
        help="instructions of one's own beside the package's, for --what instructions",
    )
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="pairs of images and captions, as `imprompt prepare` reads them, for --what pictures",
    )
    parser.add_argument(
        "--clip",
        metavar="NAME",
        help="folder or hub id of the CLIP model that measures pictures (default: "
        "openai/clip-vit-large-patch14; for diorama the base's own)",
    )
    parser.add_argument(
        "--scales",
        type=number,
        nargs="+",
        metavar="λ",
        help="of pictures with their captions as text (0 0.5 1)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def check_is_read(arguments: argparse.Namespace) -> None:
    """Raise an ImpromptError if something was given that this measurement does not look at."""
    readers: dict[str, list[str]] = {}
    for what, measurement in MEASUREMENTS.items():
        for name in measurement.reads:
            readers.setdefault(name, []).append(what)
    for name, by in readers.items():
        if getattr(arguments, name) and arguments.what not in by:
            value = arguments.adapter if name == "adapter" else f"--{name.replace('_', '-')}"
            raise ImpromptError(
                f"--what {arguments.what} does not look at {value}: leave it out, or say --what "
                f"{' or '.join(by)}."
            )


def run(arguments: argparse.Namespace) -> None:
    check_is_read(arguments)
    say("loading…")
    import json

    figures = _figures(arguments)
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        print(f"{name:<{width}}  {with_unit(name, value)}")


def _figures(arguments: argparse.Namespace) -> dict[str, float]:
    from imprompt.evaluation.judge import check_can_judge
    from imprompt.evaluation.measure import Sampling
    from imprompt.evaluation.run import Request, evaluate

    measurement = MEASUREMENTS[arguments.what]

    def load() -> Any:
        base = load_placed_base(arguments, half_on_gpu=not measurement.trains)
        if measurement.needs_judge:
            check_can_judge(base)
        return base

    request = Request(
        load=load,
        count=arguments.count,
        output=arguments.output or Path("evaluations") / arguments.what,
        sampling=Sampling(
            steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            sampler=arguments.sampler,
            seed=arguments.seed,
        ),
        scale=arguments.scale,
        adapter_file=arguments.adapter,
        map_reader_file=arguments.map_reader,
        face_encoder=arguments.face_encoder,
        control_folders=dict(
            name_and_value(text, "--control-model", "KIND=FOLDER")
            for text in arguments.control_model
        ),
        instructions_folder=arguments.instructions,
        data=arguments.data,
        clip=arguments.clip,
        scales=arguments.scales,
    )
    return evaluate(arguments.what, request)


def with_unit(name: str, value: float) -> str:
    """A figure as it is read: shares in per cent, others in what their names tell."""
    for part, form in UNITS.items():
        if part in name:
            return form.format(value)
    return f"{value:.1%}"
