"""`imprompt generate`: images from a text, from images, or from both."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from imprompt.cli.early_checks import check_command
from imprompt.cli.image_options import (
    adapter_path,
    add_identity_arguments,
    add_image_arguments,
    add_init_image_arguments,
    given,
)
from imprompt.cli.outputs import new_pictures, save_pictures, scales_of
from imprompt.cli.parsing import Once, at_least, number
from imprompt.cli.verb import (
    add_base_arguments,
    add_image_encoder_argument,
    add_place_arguments,
    add_verb,
    file_and_weight,
    load_placed_base,
    name_and_value,
    save_picture,
)
from imprompt.core.progress import say
from imprompt.diffusion.samplers import SAMPLERS, SPACINGS, Sampler


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "generate",
        run,
        about="make images from a text, from images, or from both",
        examples='  imprompt generate "a red house in the snow, as a cartoon"\n'
        "  imprompt generate --image photo.png --num-images 4\n"
        '  imprompt generate "a boat" --image photo.png --scale 0.5 --output boats.png\n'
        "  imprompt generate --image photo.png --sweep 0 0.25 0.5 0.75 1\n"
        '  imprompt generate "a boat" --image a.png --image b.png --merge mean --explain where.png\n'
        '  imprompt generate "a red car" --control depth=depth.png --control edges=edges.png:0.5 \\\n'
        "      --control-model edges=runs/edges/control\n"
        '  imprompt generate "a blue castle" --image photo.png --instruction "use the style"\n'
        '  imprompt generate "a person in the snow" --identity face.png --landmarks pose.json\n'
        '  imprompt generate "a red car" --init-image photo.png --init-mask where.png --strength 1\n'
        '  imprompt generate "a cat" --image art.png --site-preset style --base FOLDER --adapter FILE',
    )
    parser.stands_alone = "prompt"
    parser.add_argument("prompt", nargs="?", default="", help="the text; empty: the images decide")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="an image prompt; may be repeated"
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        action=Once,
        help="adapter file, diorama or diorama-instruct (default: the one that comes with the base)",
    )
    add_base_arguments(parser)
    add_image_encoder_argument(parser)
    add_place_arguments(parser, "float32 on a CPU, float16 on a GPU")
    parser.add_argument(
        "--scale", type=number, help="λ, weight of the images (1.0; beside a text rather 0.5)"
    )
    parser.add_argument(
        "--sweep", type=number, nargs="+", metavar="λ", help="a row for each of these weights"
    )
    parser.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="KIND=FILE[:WEIGHT]",
        help="a map that the images obey: depth=map.png, edges=map.png:0.7, …; may be repeated",
    )
    parser.add_argument(
        "--control-model",
        action="append",
        default=[],
        metavar="KIND=FOLDER",
        help="the ControlNet or T2I-Adapter for a kind of map (default: what comes with the base)",
    )
    parser.add_argument(
        "--control-start", type=number, help="of all controls: fraction of the steps (0)"
    )
    parser.add_argument(
        "--control-end", type=number, help="of all controls: fraction of the steps (1)"
    )
    parser.add_argument(
        "--control-mask",
        type=Path,
        metavar="FILE",
        help="where all controls act: white there, black elsewhere",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="a LoRA for the base, as diffusers and PEFT save them; may be repeated",
    )
    parser.add_argument(
        "--textual-inversion",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a word that the prompt uses (the file's name, if it says none); may be repeated",
    )
    add_identity_arguments(parser.add_argument_group("a person who shall be drawn"))
    add_init_image_arguments(parser.add_argument_group("a picture to begin from"))
    add_image_arguments(parser.add_argument_group("how images are read"))
    parser.add_argument("--negative-prompt", help="what to get away from")
    parser.add_argument("--num-images", type=at_least(1), default=4, help="how many images (4)")
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        help="how many images are drawn at once (default: by their size, for a small GPU)",
    )
    parser.add_argument("--steps", type=at_least(1), default=50, help="sampler steps (50)")
    parser.add_argument(
        "--guidance-scale",
        type=number,
        help="guidance (as the base likes it: 7.5; XL 5; diorama 3)",
    )
    parser.add_argument(
        "--image-guidance-scale",
        type=number,
        help="guidance towards the images, if it shall differ",
    )
    parser.add_argument(
        "--instruction-guidance-scale",
        type=number,
        help="guidance towards the instructions, if it shall differ",
    )
    parser.add_argument(
        "--published-guidance",
        action="store_true",
        help="all strengths as the authors of Instruct take them for the instruction",
    )
    parser.add_argument("--sampler", default="ddim", choices=tuple(SAMPLERS), help="(ddim)")
    parser.add_argument(
        "--timestep-spacing",
        choices=SPACINGS,
        help="of the sampler's steps; models of few steps want trailing (default: as the base says)",
    )
    parser.add_argument(
        "--karras-sigmas",
        action="store_true",
        help="Karras's levels of noise, for euler and dpm-solver++",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--size-px",
        type=at_least(1),
        nargs="+",
        metavar="PX",
        help="side of the images, or their height and width (default: the base's)",
    )
    parser.add_argument(
        "--output", type=Path, help="a sheet of all (images.png; if that exists images-2.png, …)"
    )
    parser.add_argument(
        "--explain", type=Path, metavar="FILE", help="also draw where images and persons acted"
    )
    parser.add_argument("--separate", action="store_true", help="also write each image on its own")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def run(arguments: argparse.Namespace) -> None:
    check_command(arguments)
    scales = scales_of(arguments)
    output, separate = new_pictures(arguments)
    say("loading…")
    from imprompt.core.images import open_image
    from imprompt.generation import Explanation, generate

    pictures = [
        path if path.suffix == ".safetensors" else open_image(path) for path in arguments.image
    ]
    base = load_placed_base(arguments)
    _extend(base, arguments)
    adapter = _adapter(arguments) if pictures else None
    published = _published_guidance(arguments, base)
    controls = _controls(arguments, base)
    identities = _identities(arguments)
    init_image = _init_image(arguments)
    guidance = _guidance(arguments, published)
    scales = [_lowered(scale, published) for scale in scales]
    images: list[Any] = []
    explanation = Explanation() if arguments.explain is not None else None
    for scale in scales:
        images += generate(
            base,
            arguments.prompt,
            _image_prompts(arguments, pictures, adapter, scale),
            negative_prompt=arguments.negative_prompt,
            num_images=arguments.num_images,
            steps=arguments.steps,
            **guidance,
            sampler=Sampler(
                name=arguments.sampler,
                timestep_spacing=arguments.timestep_spacing,
                karras_sigmas=arguments.karras_sigmas,
            ),
            seed=arguments.seed,
            size_px=_size(arguments),
            batch_size=arguments.batch_size,
            explanation=explanation,
            controls=controls,
            identities=identities,
            init_image=init_image,
        )
    save_pictures(arguments, images, base, guidance, scales, output, separate)
    print(f"{len(images)} image{'s' if len(images) > 1 else ''} in {output}")
    if explanation is not None:
        assert arguments.explain is not None
        save_picture(explanation.sheet(images), arguments.explain)
        print(f"where the images acted: {arguments.explain}")


def _image_prompts(
    arguments: argparse.Namespace, pictures: list[Any], adapter: Any, scale: float
) -> list[Any]:
    from imprompt.core.errors import ImpromptError
    from imprompt.generation import ImagePrompt

    if adapter is None:
        return []
    if arguments.image_weights is not None and arguments.merge is None:
        raise ImpromptError("--image-weights are for merged images: add --merge.")
    groups = [pictures] if arguments.merge is not None else [[picture] for picture in pictures]
    told: list[str | None] = list(arguments.instruction) or [None]
    if len(told) not in (1, len(groups)):
        raise ImpromptError(
            f"{len(told)} instructions were given for {len(groups)} image prompts: give one for all, "
            "or one for each."
        )
    options = given(
        arguments,
        "site_preset",
        "mask",
        "start",
        "end",
        "over_time",
        "merge",
        "image_weights",
        "crop",
        "face_encoder",
        "lora_scale",
        "shortcut_scale",
        negative="negative_image",
    )
    return [
        ImagePrompt(group, adapter=adapter, instruction=instruction, scale=scale, **options)
        for group, instruction in zip(groups, told * (len(groups) // len(told)), strict=True)
    ]


def _published_guidance(arguments: argparse.Namespace, base: Any) -> Any:
    """How the authors guide for the instructions on this base; None if that was not asked for."""
    from imprompt.core.errors import ImpromptError
    from imprompt.generation import published_guidance

    if not arguments.published_guidance:
        return None
    if not arguments.instruction:
        raise ImpromptError("--published-guidance goes by the instruction: add --instruction.")
    first, *others = (published_guidance(text, base) for text in arguments.instruction)
    for text, other in zip(arguments.instruction[1:], others, strict=True):
        if other != first:
            raise ImpromptError(
                f"--published-guidance guides otherwise for {arguments.instruction[0]!r} than for "
                f"{text!r}: give the strengths yourself."
            )
    return first


def _lowered(scale: float, published: Any) -> float:
    """λ as the authors lower it, but never so far that the image is fled from."""
    if published is None or scale <= 0:
        return scale
    return max(0.0, scale + float(published.added_scale))


def _guidance(arguments: argparse.Namespace, published: Any) -> dict[str, Any]:
    """The strengths of guidance, as `generate` takes them."""
    if published is None:
        names = ("guidance_scale", "image_guidance_scale", "instruction_guidance_scale")
        return {name: getattr(arguments, name) for name in names}
    return {
        "guidance_scale": published.text_scale,
        "image_guidance_scale": published.image_scale,
        "instruction_guidance_scale": published.instruction_scale,
    }


def _adapter(arguments: argparse.Namespace) -> Any:
    from imprompt.checkpoints import load_adapter
    from imprompt.core.errors import ImpromptError

    path = adapter_path(arguments)
    if path is None:
        raise ImpromptError(f"Name the --adapter to read images with on the base {arguments.base}.")
    return load_adapter(path)


def _extend(base: Any, arguments: argparse.Namespace) -> None:
    """Put what others trained on the base."""
    from imprompt.bases.extensions import add_lora, add_textual_inversion

    for place, text in enumerate(arguments.lora):
        file, weight = file_and_weight(text)
        add_lora(base, Path(file), weight, name=f"lora{place}")
    for file in arguments.textual_inversion:
        add_textual_inversion(base, file)


def _controls(arguments: argparse.Namespace, base: Any) -> list[Any]:
    from imprompt.checkpoints import load_control, shipped_controls
    from imprompt.core.errors import ImpromptError
    from imprompt.core.images import open_image
    from imprompt.generation import Control

    folders = dict(
        name_and_value(text, "--control-model", "KIND=FOLDER") for text in arguments.control_model
    )
    shipped = shipped_controls() if arguments.base == "diorama" else {}
    controls: list[Control] = []
    used: set[str] = set()
    for text in arguments.control:
        kind, value = name_and_value(text, "--control", "KIND=FILE")
        file, weight = file_and_weight(value)
        folder = folders.get(kind) or shipped.get(kind)
        if folder is None:
            raise ImpromptError(
                f"There is no control for {kind} maps with the base {arguments.base} (there are: "
                f"{', '.join(shipped) or 'none'}): name one with --control-model {kind}=FOLDER, as "
                "`imprompt train controlnet` or `imprompt train t2i-adapter` makes them."
            )
        used.add(kind)
        model = load_control(folder, dtype=base.dtype, device=base.device)
        if model.kind not in ("", kind):
            raise ImpromptError(f"{folder} reads {model.kind} maps, not {kind} maps.")
        span = given(arguments, start="control_start", end="control_end", mask="control_mask")
        controls.append(Control(image=open_image(file), model=model, weight=weight, **span))
    if unused := set(folders) - used:
        kind = sorted(unused)[0]
        raise ImpromptError(
            f"--control-model {kind}=… was given, but no --control {kind}=FILE for it to read."
        )
    return controls


def _identities(arguments: argparse.Namespace) -> list[Any]:
    from imprompt.checkpoints import load_identity
    from imprompt.core.errors import ImpromptError
    from imprompt.core.images import open_image
    from imprompt.generation import IdentityPrompt

    if not arguments.identity:
        return []
    if arguments.identity_model is None and arguments.base != "diorama":
        raise ImpromptError(f"Name the --identity-model for the base {arguments.base}.")
    identity = load_identity(arguments.identity_model or "diorama")
    options = given(arguments, "face_encoder", scale="identity_scale", net_weight="identity_net")
    places = arguments.landmarks or [None] * len(arguments.identity)
    masks = arguments.identity_mask or [None] * len(arguments.identity)
    return [
        IdentityPrompt(open_image(picture), identity, landmarks=landmarks, mask=mask, **options)
        for picture, landmarks, mask in zip(arguments.identity, places, masks, strict=True)
    ]


def _init_image(arguments: argparse.Namespace) -> Any:
    """What `generate` begins from; None is noise."""
    from imprompt.core.images import open_image
    from imprompt.generation import InitImage

    if arguments.init_image is None:
        return None
    options = given(arguments, "strength", mask="init_mask")
    return InitImage(image=open_image(arguments.init_image), **options)


def _size(arguments: argparse.Namespace) -> int | tuple[int, int] | None:
    """What `generate` takes: one side, or (height, width)."""
    if arguments.size_px is None:
        return None
    return arguments.size_px[0] if len(arguments.size_px) == 1 else tuple(arguments.size_px)
