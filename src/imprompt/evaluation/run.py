"""What `imprompt evaluate` measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from imprompt.bases import Base
from imprompt.checkpoints import load_adapter, load_control, shipped_controls
from imprompt.checkpoints.identity import reads_faces
from imprompt.core.errors import ImpromptError
from imprompt.core.shipped import ADAPTERS, IDENTITIES, shipped
from imprompt.evaluation.ablation import measure_ablation
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

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
STYLE_SCALES = (1.0, 1.5, 2.0)


def evaluate(
    what: str,
    *,
    adapter_file: Path | None,
    load: Callable[[], Base],
    count: int,
    steps: int,
    sampler: str,
    guidance_scale: float | None,
    scale: float,
    seed: int,
    output: Path,
    map_reader_file: Path | None = None,
    face_encoder: str | None = None,
    control_folders: Mapping[str, str | Path] | None = None,
    instructions_folder: Path | None = None,
) -> dict[str, float]:
    """Named figures: shares in [0, 1], but for distances, similarities and sizes, as their names say.

    `what` is judge, base, adapter, ablation, identity, control, instruct,
    instruct-table or instructions. Without a guidance scale the base's own is taken. `load` brings the base,
    which the judge does without.

    Raises:
        ImpromptError: a part is missing, there is no control to measure, nothing to draw.
    """
    for name, value in (("count", count), ("steps", steps)):
        if value < 1:
            raise ImpromptError(f"{name} is {value}, but must be at least 1.")
    judge = load_judge()
    if what == "judge":
        return measure_judge(judge, count)
    sampling = Sampling(steps=steps, guidance_scale=guidance_scale, sampler=sampler, seed=seed)
    if what == "ablation":
        return measure_ablation(load, judge, sampling, output, count)
    base = load()
    if what == "base":
        return measure_base(base, judge, sampling, count)
    if what == "control":
        folders = control_folders or shipped_controls()
        if not folders:
            raise ImpromptError("No control is shipped; name one with --control-model KIND=FOLDER.")
        controls = {kind: load_control(folder) for kind, folder in folders.items()}
        reader = load_map_reader(map_reader_file)
        is_embedded = base.name == "diorama"
        beside = (
            load_adapter(shipped(ADAPTERS["diorama"]), device=base.device) if is_embedded else None
        )
        _, _, rows = measure_controls(
            base, controls, reader, judge, sampling, count=count, adapter=beside
        )
        return {f"{row.name}: {k}": value for row in rows for k, value in row.figures.items()}
    if what == "identity":
        path = adapter_file or shipped(IDENTITIES["diorama"])
        return evaluate_identity(base, path, judge, sampling, output, count, scale, face_encoder)
    if what == "instruct":
        adapter = load_adapter(
            adapter_file or shipped(ADAPTERS["diorama-instruct"]), device=base.device
        )
        return measure_instruct(base, adapter, judge, sampling, count, scale)
    if what == "instructions":
        return map_instructions(base, output, instructions_folder)
    if what == "instruct-table":
        return measure_instruct_table(load, judge, sampling, output, count, scale)
    adapter = load_adapter(adapter_file or shipped(ADAPTERS["diorama"]), device=base.device)
    if reads_faces(adapter):
        raise ImpromptError(
            f"{adapter_file} is a {adapter.variant} adapter, which reads faces: measure it with "
            "--what identity."
        )
    kept = measure_adapter(base, adapter, judge, sampling, count, scale).kept
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
