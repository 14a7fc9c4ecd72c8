"""`imprompt evaluate`: figures for the judge, the base, or an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from imprompt.cli.parsing import at_least, number
from imprompt.cli.verb import add_place_arguments, add_verb, load_placed_base, name_and_value
from imprompt.core.errors import ImpromptError
from imprompt.core.progress import say
from imprompt.diffusion.samplers import SAMPLERS

# By a part of a figure's name; all others are shares.
UNITS = {
    "landmark error": "{:.2f} px",
    "keypoint error": "{:.2f} px",
    "depth error": "{:.1f} of 255",
    "parameters": "{:,.0f}",
    "CLIP-": "{:.3f}",
}


# These train before they measure, beside a base in full precision.
TRAINING = ("ablation", "instruct-table")
# These ask no judge what a base draws.
UNJUDGED = ("judge", "instructions")


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "evaluate",
        run,
        about="measure an adapter (or the base, or the judge) on unseen scenes of the embedded world",
        examples="  imprompt evaluate runs/first/adapter.safetensors\n"
        "  imprompt evaluate --what base --count 500\n"
        "  imprompt evaluate --what judge --count 5000\n"
        "  imprompt evaluate --what ablation --output runs/ablation\n"
        "  imprompt evaluate runs/person/identity --what identity --count 100\n"
        "  imprompt evaluate --what control --control-model depth=runs/depth/control --count 48\n"
        "  imprompt evaluate runs/instruct/adapter.safetensors --what instruct --count 48\n"
        "  imprompt evaluate --what instruct-table --output runs/instruct-table",
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
        choices=(
            "adapter",
            "base",
            "judge",
            "ablation",
            "identity",
            "control",
            "instruct",
            "instruct-table",
            "instructions",
        ),
        help="what is measured: an image-prompt adapter (the default), the base, the judge; two ways of "
        "joining tokens (ablation); a person kept; controls; Instruct, its comparison with rivals, or a map "
        "of its instructions",
    )
    parser.add_argument(
        "--base", default="diorama", help="diorama, or a folder of a base for 64 px"
    )
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
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


# What reads what else a command may name.
READERS = {
    "adapter": ("adapter", "identity", "instruct"),
    "map_reader": ("control",),
    "control_model": ("control",),
    "face_encoder": ("identity",),
}


def check_is_read(arguments: argparse.Namespace) -> None:
    """Raise an ImpromptError if something was given that this measurement does not look at."""
    for name, readers in READERS.items():
        if getattr(arguments, name) and arguments.what not in readers:
            value = arguments.adapter if name == "adapter" else f"--{name.replace('_', '-')}"
            raise ImpromptError(
                f"--what {arguments.what} does not look at {value}: leave it out, or say --what "
                f"{' or '.join(readers)}."
            )


def run(arguments: argparse.Namespace) -> None:
    check_is_read(arguments)
    say("loading…")
    import json

    from imprompt.evaluation.judge import check_can_judge
    from imprompt.evaluation.run import evaluate

    def load() -> Any:
        base = load_placed_base(arguments, half_on_gpu=arguments.what not in TRAINING)
        if arguments.what not in UNJUDGED:
            check_can_judge(base)
        return base

    figures = evaluate(
        arguments.what,
        adapter_file=arguments.adapter,
        load=load,
        count=arguments.count,
        steps=arguments.steps,
        sampler=arguments.sampler,
        guidance_scale=arguments.guidance_scale,
        scale=arguments.scale,
        seed=arguments.seed,
        output=arguments.output or Path("evaluations") / arguments.what,
        map_reader_file=arguments.map_reader,
        face_encoder=arguments.face_encoder,
        control_folders=dict(
            name_and_value(text, "--control-model", "KIND=FOLDER")
            for text in arguments.control_model
        ),
        instructions_folder=arguments.instructions,
    )
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        print(f"{name:<{width}}  {with_unit(name, value)}")


def with_unit(name: str, value: float) -> str:
    """A figure as it is read: shares in per cent, others in what their names tell."""
    for part, form in UNITS.items():
        if part in name:
            return form.format(value)
    return f"{value:.1%}"
