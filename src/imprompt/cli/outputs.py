"""Where `imprompt generate` puts its pictures, and what it writes into them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from imprompt.cli.image_options import adapter_path
from imprompt.cli.verb import new_picture, save_picture

DEFAULT = "images"


def scales_of(arguments: argparse.Namespace) -> list[float]:
    """λ of each row of the sheet."""
    return arguments.sweep or [1.0 if arguments.scale is None else arguments.scale]


def new_pictures(arguments: argparse.Namespace) -> tuple[Path, list[Path]]:
    """The sheet's file, and with --separate that of each image.

    Without --output the sheet is images.png, or the first of images-2.png, … of which nothing is there.

    Raises:
        ImpromptError: a file that was named is no picture's, or exists.
    """
    num_images = len(scales_of(arguments)) * arguments.num_images if arguments.separate else 0

    def files(sheet: Path) -> list[Path]:
        numbered = (f"{sheet.stem}-{number:03d}{sheet.suffix}" for number in range(num_images))
        return [sheet, *(sheet.with_name(name) for name in numbered)]

    if arguments.output is not None:
        wanted = files(arguments.output)
    elif arguments.overwrite:
        wanted = files(Path(f"{DEFAULT}.png"))
    else:
        names = (DEFAULT if number == 1 else f"{DEFAULT}-{number}" for number in count(1))
        candidates = (files(Path(f"{name}.png")) for name in names)
        wanted = next(free for free in candidates if not any(file.exists() for file in free))
    sheet, *separate = [new_picture(file, overwrite=arguments.overwrite) for file in wanted]
    if arguments.explain is not None:
        new_picture(arguments.explain, overwrite=arguments.overwrite)
    return sheet, separate


def save_pictures(
    arguments: argparse.Namespace,
    images: Sequence[Any],
    base: Any,
    guidance: Mapping[str, float | None],
    scales: Sequence[float],
    sheet: Path,
    separate: Sequence[Path],
) -> None:
    """Write the sheet, a row for each λ in `scales`, and the images of their own.

    Raises:
        ImpromptError: one cannot be written.
    """
    from imprompt.core.images import image_grid

    size = images[0].size
    columns, labels = min(len(images), 8), None
    if len(scales) > 1:
        columns = arguments.num_images
        labels = [f"scale {scale:g}" for scale in scales for _ in range(columns)]
    text = settings_text(arguments, base, guidance, scales, size)
    save_picture(image_grid(images, columns, labels), sheet, text, arguments.command)
    for number, file in enumerate(separate):
        scale = scales[number // arguments.num_images]
        text = settings_text(arguments, base, guidance, [scale], size)
        save_picture(images[number], file, text, arguments.command)


def settings_text(
    arguments: argparse.Namespace,
    base: Any,
    guidance: Mapping[str, float | None],
    scales: Sequence[float],
    size: tuple[int, int],
) -> str:
    """How images of `size` (width, height) were made, in the form of A1111's "parameters"."""
    guidance_scale = guidance["guidance_scale"]
    guidance_scale = base.guidance_scale if guidance_scale is None else guidance_scale
    further = {
        "Image CFG scale": "image_guidance_scale",
        "Instruction CFG scale": "instruction_guidance_scale",
    }
    settings: dict[str, Any] = {
        "Steps": arguments.steps,
        "Sampler": arguments.sampler,
        **({"Schedule type": "Karras"} if arguments.karras_sigmas else {}),
        "CFG scale": f"{guidance_scale:g}",
        **{
            name: f"{guidance[key]:g}" for name, key in further.items() if guidance[key] is not None
        },
        "Seed": arguments.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": base.name,
    }
    adapter = adapter_path(arguments)
    if arguments.image and adapter is not None:
        settings["Adapter"] = adapter.name
        settings["Scale"] = " ".join(f"{scale:g}" for scale in scales)
    if arguments.init_image is not None:
        from imprompt.generation import InitImage

        strength = InitImage.strength if arguments.strength is None else arguments.strength
        settings["Denoising strength"] = f"{strength:g}"
    lines = [arguments.prompt]
    if arguments.negative_prompt is not None:
        lines.append(f"Negative prompt: {arguments.negative_prompt}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in settings.items())])
