"""Table 1 of IP-Adapter-Instruct in this world's terms: one model for five tasks, or five models.

From the same first stage and with the same number of steps each are trained: the joint model; one model
per task, which sees that task's lessons alone; and the joint model with one fixed instruction per task
instead of many. Each is then asked for each task it was trained on; the last in its own instructions, and
in other words.

Source: IP-Adapter-Instruct (2408.03209), section 4, tables 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from imprompt.bases import Base
from imprompt.checkpoints import load_adapter
from imprompt.data.columns import default_columns
from imprompt.data.dataset import Columns, ColumnsWriter
from imprompt.data.instruct_scenes import InstructExample
from imprompt.data.instructions import TASKS, filled
from imprompt.data.prepare import prepare
from imprompt.diorama import OBJECT_KINDS
from imprompt.evaluation.clip_scores import ClipScores
from imprompt.evaluation.instruct import measure_task, unseen_lessons
from imprompt.evaluation.measure import Sampling
from imprompt.systems.classifier import Judge
from imprompt.training.run import run_training

LAYOUTS_PRESET, WORDS_PRESET = "diorama-instruct-layouts", "diorama-instruct-words"
PRESET = "diorama-instruct"
ONE_INSTRUCTION = "one fixed instruction"
FIXED = {
    "everything": "use everything",
    "style": "use the style",
    "object": "use the {object}",
    "composition": "use the composition",
    "face": "use the face",
}


def measure_instruct_table(
    load: Callable[[], Base],
    judge: Judge,
    sampling: Sampling,
    output: Path,
    count: int,
    scale: float = 1.0,
    *,
    num_pairs: int = 3000,
    steps: int = 300,
    words: Path | None = None,
    words_settings: list[str] | None = None,
    settings: list[str] | None = None,
) -> dict[str, float]:
    """Figures of each model for each task, by name. What `output` has already is not done again.

    `load` brings the base, anew for each training and measurement, since a training leaves its adapter
    in the base. `words` is a first stage that is trained already; without it one is trained.
    """
    base = load()
    data = prepare(
        f"diorama-instruct:{num_pairs}",
        output / "data",
        base,
        columns=default_columns("instruct-words"),
        batch_size=250,
    )
    columns = Columns.open(data)
    sets = {"joint": data, ONE_INSTRUCTION: with_fixed_instructions(columns, base, output)}
    for task in TASKS:
        sets[task] = rows_of_task(columns, task, output / task)

    if words is None:
        words = _first_stage(load, sets["composition"], data, output, words_settings or [])
    clip = ClipScores(base)
    figures: dict[str, float] = {}
    for name, folder in sets.items():
        file = run_training(
            "instruct",
            data=folder,
            base=load(),
            output=output / "runs" / name.replace(" ", "-"),
            preset=PRESET,
            settings=[
                f'system.start_from="{words}"',
                f"train.steps={steps}",
                "train.validation_rows=40",
                *(settings or []),
            ],
        )
        own_base, adapter = load(), load_adapter(file)
        label = f"{name} alone" if name in TASKS else name
        for task in (name,) if name in TASKS else TASKS:
            lessons = unseen_lessons(task, count)
            asked = {label: lessons}
            if name == ONE_INSTRUCTION:
                asked = {label: fixed(lessons), f"{label}, asked in other words": lessons}
            for row, asking in asked.items():
                result = measure_task(
                    own_base, adapter, judge, sampling, task, count, scale, clip, asking
                )
                figures |= {f"{task}, {row}: {key}": x for key, x in result.figures.items()}
    return figures


def _first_stage(
    load: Callable[[], Base], layouts: Path, data: Path, output: Path, settings: list[str]
) -> Path:
    """A resampler that has learnt layouts, and then the words of all tasks."""
    begun = run_training(
        "instruct-words",
        data=layouts,
        base=load(),
        output=output / "layouts",
        preset=LAYOUTS_PRESET,
        settings=settings,
    )
    return run_training(
        "instruct-words",
        data=data,
        base=load(),
        output=output / "words",
        preset=WORDS_PRESET,
        settings=[*settings, f'system.start_from="{begun}"'],
    )


def fixed(lessons: Sequence[InstructExample]) -> list[InstructExample]:
    """The same lessons, each asked for in its task's one instruction."""
    return [
        replace(lesson, instruction=filled(FIXED[lesson.task], lesson.condition.kind))
        for lesson in lessons
    ]


def rows_of_task(columns: Columns, task: str, folder: Path) -> Path:
    """A folder with the rows of one task, if it is not there already."""
    if not (folder / "meta.json").exists():
        tasks = columns.rows(range(len(columns)), ["task_ids"])["task_ids"].numpy()
        rows = np.flatnonzero(tasks == TASKS.index(task))
        folder.mkdir(parents=True, exist_ok=True)
        writer = ColumnsWriter(folder)
        writer.write(0, columns.rows(rows, columns.names))
        writer.finish(len(rows), {k: v for k, v in columns.meta.items() if k != "num_parts"})
    return folder


def with_fixed_instructions(columns: Columns, base: Base, output: Path) -> Path:
    """The same data with one instruction per task."""
    folder = output / "fixed"
    if not (folder / "meta.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = columns.rows(range(len(columns)), columns.names)
        kinds = _object_kinds(rows["kept_ids"], base)
        told = [
            filled(FIXED[TASKS[task]], kind)
            for task, kind in zip(rows["task_ids"].tolist(), kinds, strict=True)
        ]
        rows["instruction_ids"] = base.tokenize(told)
        writer = ColumnsWriter(folder)
        writer.write(0, rows)
        meta = {k: v for k, v in columns.meta.items() if k != "num_parts"}
        writer.finish(len(columns), {**meta, "instructions": "one per task"})
    return folder


def _object_kinds(kept_ids: torch.Tensor, base: Base) -> list[str]:
    """The kind of object that the words for what is kept name; empty where they name none."""
    texts = [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in kept_ids.tolist()]
    return [next((kind for kind in OBJECT_KINDS if kind in text.split()), "") for text in texts]
