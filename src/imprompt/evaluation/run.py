"""What `imprompt evaluate` measures: one function for each name of the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imprompt.bases import Base
from imprompt.checkpoints import load_adapter, load_control, shipped_controls
from imprompt.checkpoints.identity import reads_faces
from imprompt.core.errors import ImpromptError
from imprompt.core.shipped import ADAPTERS, IDENTITIES, shipped
from imprompt.evaluation.ablation import measure_ablation
from imprompt.evaluation.catalogue import measurement
from imprompt.evaluation.clip_model import PUBLISHED, load_clip_model
from imprompt.evaluation.clip_scores import ClipScores
from imprompt.evaluation.control import measure_controls
from imprompt.evaluation.identity import evaluate_identity
from imprompt.evaluation.instruct import measure_instruct
from imprompt.evaluation.instruct_table import measure_instruct_table
from imprompt.evaluation.instruction_map import map_instructions
from imprompt.evaluation.judge import load_judge
from imprompt.evaluation.map_reader import load_map_reader
from imprompt.evaluation.measure import (
    Sampling,
    measure_adapter,
    measure_base,
    measure_judge,
    measure_text_and_image,
)
from imprompt.evaluation.pictures import Clip, evaluate_pictures

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
STYLE_SCALES = (1.0, 1.5, 2.0)
PICTURE_SCALES = (0.0, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be measured, and how; None is what comes with the package, or none."""

    load: Callable[[], Base]
    """Brings the base, anew at each call."""
    count: int
    """How many images."""
    output: Path
    """The folder of the runs of what trains, and of pictures."""
    sampling: Sampling = field(default_factory=Sampling)
    scale: float = 1.0
    """λ for image prompts alone."""
    adapter_file: Path | None = None
    """Also an identity's folder."""
    map_reader_file: Path | None = None
    face_encoder: str | None = None
    """What an identity was trained with, where its file does not tell or it is one's own."""
    control_folders: Mapping[str, str | Path] | None = None
    """By kind of map."""
    instructions_folder: Path | None = None
    data: str | None = None
    """The source of pictures of one's own."""
    clip: str | None = None
    """Folder or hub id of the model that measures these."""
    scales: Sequence[float] | None = None
    """λ of these with their captions as text."""


def evaluate(what: str, request: Request) -> dict[str, float]:
    """Named figures: shares in [0, 1], but for distances, similarities and sizes, as their names say.

    `what` is a name of the catalogue.

    Raises:
        ImpromptError: there is no such measurement, a part is missing, there is nothing to draw.
    """
    measure = measurement(what).load()
    for name, value in (("count", request.count), ("steps", request.sampling.steps)):
        if value < 1:
            raise ImpromptError(f"{name} is {value}, but must be at least 1.")
    return measure(request)


def of_judge(request: Request) -> dict[str, float]:
    """How often the judge is right."""
    return measure_judge(load_judge(), request.count)


def of_base(request: Request) -> dict[str, float]:
    """How much of its captions a base draws."""
    return measure_base(request.load(), load_judge(), request.sampling, request.count)


def of_adapter(request: Request) -> dict[str, float]:
    """How much of an image prompt is kept, alone and beside a text."""
    base, judge = request.load(), load_judge()
    adapter = load_adapter(request.adapter_file or shipped(ADAPTERS["diorama"]), device=base.device)
    if reads_faces(adapter):
        raise ImpromptError(
            f"{request.adapter_file} is a {adapter.variant} adapter, which reads faces: measure it with "
            "--what identity."
        )
    sampling, count = request.sampling, request.count
    kept = measure_adapter(base, adapter, judge, sampling, count, request.scale).kept
    figures = {f"{name} kept, image alone": share for name, share in kept.items()}
    for name, preset, scales in (
        ("", None, SCALES),
        (" by preset style", "style", STYLE_SCALES),
    ):
        _, _, points = measure_text_and_image(
            base, adapter, judge, sampling, max(12, count // 2), scales, preset
        )
        for point in points:
            prefix = f"image and text, λ={point.scale:g}{name}"
            figures[f"{prefix}: object of the text"] = point.follows_text
            figures[f"{prefix}: look of the image"] = point.follows_image
            figures[f"{prefix}: both"] = point.follows_both
    return figures


def of_ablation(request: Request) -> dict[str, float]:
    """Decoupled against concatenated attention."""
    return measure_ablation(
        request.load, load_judge(), request.sampling, request.output, request.count
    )


def of_identity(request: Request) -> dict[str, float]:
    """Whether the person is kept, and where the face stands."""
    return evaluate_identity(
        request.load(),
        request.adapter_file or shipped(IDENTITIES["diorama"]),
        load_judge(),
        request.sampling,
        request.output,
        request.count,
        request.scale,
        request.face_encoder,
    )


def of_controls(request: Request) -> dict[str, float]:
    """How well maps are obeyed."""
    folders = request.control_folders or shipped_controls()
    if not folders:
        raise ImpromptError("No control is shipped; name one with --control-model KIND=FOLDER.")
    base = request.load()
    is_embedded = base.name == "diorama"
    _, _, rows = measure_controls(
        base,
        {kind: load_control(folder) for kind, folder in folders.items()},
        load_map_reader(request.map_reader_file),
        load_judge(),
        request.sampling,
        count=request.count,
        adapter=load_adapter(shipped(ADAPTERS["diorama"]), device=base.device)
        if is_embedded
        else None,
    )
    return {f"{row.name}: {k}": value for row in rows for k, value in row.figures.items()}


def of_instruct(request: Request) -> dict[str, float]:
    """Whether what was asked of an image is taken from it."""
    base = request.load()
    file = request.adapter_file or shipped(ADAPTERS["diorama-instruct"])
    adapter = load_adapter(file, device=base.device)
    return measure_instruct(
        base, adapter, load_judge(), request.sampling, request.count, request.scale
    )


def of_instruct_table(request: Request) -> dict[str, float]:
    """One Instruct model for five tasks against five models."""
    return measure_instruct_table(
        request.load,
        load_judge(),
        request.sampling,
        request.output,
        request.count,
        request.scale,
    )


def of_instructions(request: Request) -> dict[str, float]:
    """How well instructions of different tasks stand apart."""
    return map_instructions(request.load(), request.output, request.instructions_folder)


def of_pictures(request: Request) -> dict[str, float]:
    """How near what is drawn is to pictures of one's own, and to their captions."""
    if request.data is None:
        raise ImpromptError("Name the pictures with --data: a folder, an archive, or a list.")
    base = request.load()
    is_embedded = base.name == "diorama"
    if request.adapter_file is None and not is_embedded:
        raise ImpromptError(f"Name the adapter to measure on the base {base.name}.")

    def load_clip() -> Clip:
        if request.clip is None and is_embedded:
            return ClipScores(base)
        return load_clip_model(request.clip or PUBLISHED, base.device)

    return evaluate_pictures(
        base,
        load_adapter(request.adapter_file or shipped(ADAPTERS["diorama"])),
        load_clip,
        request.data,
        request.sampling,
        request.output,
        request.count,
        request.scales or PICTURE_SCALES,
        request.scale,
    )
