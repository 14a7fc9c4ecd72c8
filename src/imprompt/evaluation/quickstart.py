"""The first ten minutes: train an adapter on the embedded base, use it, judge it, and show it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from imprompt.adapters import ImagePromptAdapter
from imprompt.bases import Base, image_encoder_of, load_base
from imprompt.checkpoints import load_adapter
from imprompt.core.errors import ImpromptError
from imprompt.core.images import pixels_to_images
from imprompt.data.dataset import Columns
from imprompt.data.prepare import prepare
from imprompt.diorama import caption, render, sample_scene
from imprompt.evaluation.judge import load_judge
from imprompt.evaluation.measure import (
    ImagePromptResult,
    Sampling,
    SweepPoint,
    draw,
    measure_adapter,
    measure_text_and_image,
    prompt_of_pictures,
)
from imprompt.evaluation.report import (
    Report,
    commands,
    line_chart,
    picture_rows,
    table,
)
from imprompt.training.run import run_training

FIRST_SEED = 3_000_000
NUM_STEPS = 680  # fewer than the preset's, so that all of it ends within ten minutes on two cores
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
SAMPLING = Sampling(steps=25, sampler="dpm-solver++")

NEXT_STEPS = """\
imprompt generate --image photo.png --adapter {adapter}
imprompt generate "as line art" --image photo.png --adapter {adapter} --sweep 0 0.25 0.5 0.75 1
imprompt prepare photos/ my-data/        # images, each with a .txt caption beside it
imprompt train image-prompt --data my-data/ --output runs/mine --preset diorama"""


@dataclass
class Timing:
    """Seconds per stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin


def quickstart(
    output: Path, *, num_pairs: int = 3200, settings: list[str] | None = None, num_judged: int = 72
) -> Path:
    """Render pairs, train, generate, judge; returns the path of `report.html`.

    Run again with the same output, it uses what is there: data are not prepared twice and a finished
    training is not repeated.

    Raises:
        ImpromptError: `output` holds something else.
        Interrupted: stopped during training, which has saved; the same call goes on.
    """
    if output.exists() and any(output.iterdir()) and not (output / "data").is_dir():
        raise ImpromptError(
            f"{output} is not empty and holds no quickstart. Choose another folder with --output."
        )
    timing = Timing()
    with timing.stage("load the base"):
        base, judge = load_base("diorama"), load_judge()
    with timing.stage(f"render and encode {num_pairs} pairs"):
        data = prepare(f"diorama:{num_pairs}:{FIRST_SEED}", output / "data", base)
    with timing.stage("train the adapter"):
        adapter_file = run_training(
            "image-prompt",
            data=data,
            base=base,
            output=output / "run",
            preset="diorama-image-prompt",
            settings=[f"train.steps={NUM_STEPS}", *(settings or [])],
        )
    base = load_base("diorama")
    adapter = load_adapter(adapter_file)
    with timing.stage("generate and judge image prompts"):
        alone = measure_adapter(base, adapter, judge, SAMPLING, count=num_judged)
    with timing.stage("generate and judge image with text"):
        sweep = measure_text_and_image(
            base, adapter, judge, SAMPLING, count=max(4, num_judged // 2), scales=SCALES
        )
    with timing.stage("draw the gallery"):
        gallery = _draw_gallery(base, adapter, alone)
    losses = _validation_losses(output / "run" / "log.jsonl")
    report = output / "report.html"
    columns = Columns.open(data)
    _write_report(report, base, adapter_file, columns, alone, sweep, gallery, losses, timing)
    kept = alone.kept
    print(
        f"kept of unseen image prompts: object {kept['kind']:.0%}, colour {kept['colour']:.0%}, "
        f"style {kept['style']:.0%}\nadapter: {adapter_file}\nreport:  {report.resolve()}"
    )
    return report


@dataclass(frozen=True)
class Gallery:
    """Pictures to look at, each tensor (rows, columns, 3, size, size)."""

    by_scale: Tensor
    variations: Tensor
    with_text: Tensor
    texts: tuple[str, ...]
    zero_is_bare: bool


def _draw_gallery(base: Base, adapter: ImagePromptAdapter, alone: ImagePromptResult) -> Gallery:
    references = alone.references[:6]
    count = len(references)
    texts = ("as line art", "in neon light", "as a watercolor")
    with adapter.install(base.unet) as handle, torch.inference_mode():
        prompt = prompt_of_pictures(base, adapter, handle, references)
        tokens = prompt.tokens

        def made(words: list[str], tokens: Tensor, scale: float) -> Tensor:
            return draw(base, words, [replace(prompt, tokens=tokens, scale=scale)], SAMPLING)

        by_scale = torch.stack([made([""] * count, tokens, scale) for scale in SCALES], 1)
        variations = torch.stack(
            [made([""] * 6, tokens[i : i + 1].repeat(6, 1, 1), 1.0) for i in range(min(3, count))]
        )
        with_text = torch.stack([made([text] * count, tokens, 0.5) for text in texts], 1)
    bare = draw(base, [""] * count, (), SAMPLING, show_progress=False)
    return Gallery(by_scale, variations, with_text, texts, bool(torch.equal(bare, by_scale[:, 0])))


def _validation_losses(log_file: Path) -> list[dict[str, float | int]]:
    lines = [json.loads(line) for line in log_file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "validation_loss_with_image" in line]


def _nearest(base: Base, images: Tensor, columns: Columns) -> Tensor:
    """The training pictures whose image embeddings are nearest to those of generated ones."""
    generated = functional.normalize(image_encoder_of(base).embeds(images), dim=1)
    trained = columns.rows(range(len(columns)), ["image_embeds"])["image_embeds"].float()
    rows = (generated @ functional.normalize(trained, dim=1).T).argmax(1)
    return render([sample_scene(FIRST_SEED + int(row)) for row in rows]).pixels


def _write_report(
    path: Path,
    base: Base,
    adapter_file: Path,
    columns: Columns,
    alone: ImagePromptResult,
    sweep: tuple[list, Tensor, list[SweepPoint]],
    gallery: Gallery,
    losses: list[dict[str, float | int]],
    timing: Timing,
) -> None:
    show = pixels_to_images
    kept, points = alone.kept, sweep[2]
    best = max(points, key=lambda point: point.follows_both)
    report = Report(
        "An image is a prompt",
        "Minutes ago this machine trained an IP-Adapter: a small network that lets a frozen "
        "text-to-image model read a picture as it reads a text. Everything below was made with it, "
        "from pictures that it has never seen.",
    )
    report.numbers(
        {
            "object kept": f"{kept['kind']:.0%}",
            "colour kept": f"{kept['colour']:.0%}",
            "style kept": f"{kept['style']:.0%}",
            f"image and text together, λ = {best.scale:g}": f"{best.follows_both:.0%}",
            "in all": f"{sum(timing.seconds.values()) / 60:.1f} min",
        }
    )
    references = alone.references[:6]
    report.section(
        "From the text's picture to the image's",
        "Left the image prompt; then what the model draws from it with an empty text, as the weight "
        "λ of the image grows. Each row starts from the same noise. At λ = 0 the picture is the bare "
        + ("model's, bit for bit." if gallery.zero_is_bare else "model's."),
        picture_rows(
            [
                (caption(scene), show(torch.cat([reference[None], row])))
                for scene, reference, row in zip(
                    alone.scenes, references, gallery.by_scale, strict=False
                )
            ],
            ["image prompt", *(f"λ = {scale:g}" for scale in SCALES)],
        ),
    )
    report.section(
        "Variations",
        "The same image prompt with six different noises, λ = 1.",
        picture_rows(
            [
                ("", show(torch.cat([reference[None], row])))
                for reference, row in zip(references, gallery.variations, strict=False)
            ],
            ["image prompt"],
        ),
    )
    report.section(
        "The same, but …",
        "Image and text together, λ = 0.5: the text changes what it names and leaves the rest.",
        picture_rows(
            [
                ("", show(torch.cat([reference[None], row])))
                for reference, row in zip(references, gallery.with_text, strict=False)
            ],
            ["image prompt", *(f"“{text}”" for text in gallery.texts)],
        ),
    )
    report.section(
        "Who decides: the image or the text?",
        "The image prompt gives style and colour, the text names another object. The judge says how "
        "many pictures have the text's object, the image's style and colour, and all of it.",
        line_chart(
            {
                "object of the text": [(p.scale, p.follows_text) for p in points],
                "look of the image": [(p.scale, p.follows_image) for p in points],
                "both": [(p.scale, p.follows_both) for p in points],
            },
            x_name="λ",
            as_percent=True,
        ),
    )
    report.section(
        "What the judge saw",
        f"{len(alone.scenes)} unseen image prompts, empty text, λ = 1: the share of pictures in "
        "which the reference's attribute is found again.",
        table(
            ["attribute", "kept"],
            [(name.replace("kind", "object"), f"{share:.1%}") for name, share in kept.items()],
        ),
    )
    if losses:
        report.section(
            "Does the image help?",
            "Error of the noise prediction on held-out pairs at fixed noise and timesteps, without "
            "text: with the image it must fall below the line without.",
            line_chart(
                {
                    "with the image": [
                        (float(e["step"]), e["validation_loss_with_image"]) for e in losses
                    ],
                    "without": [
                        (float(e["step"]), e["validation_loss_without_image"]) for e in losses
                    ],
                },
                x_name="step",
            ),
        )
    report.section(
        "Not from memory",
        "Above what was generated, below the training picture nearest to it by CLIP embedding.",
        picture_rows(
            [
                ("generated", show(alone.images[:8])),
                ("nearest", show(_nearest(base, alone.images[:8], columns))),
            ]
        ),
    )
    report.section(
        "Where the time went",
        "On this machine.",
        table(["stage", "seconds"], [(n, f"{s:.0f}") for n, s in timing.seconds.items()]),
    )
    report.section(
        "Go on",
        "The adapter is an ordinary file in the published layout.",
        commands(NEXT_STEPS.format(adapter=adapter_file)),
    )
    report.write(path)
