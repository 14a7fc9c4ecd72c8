"""One model for five tasks or five models: the data of each, and the rows of the table."""

from functools import partial

import pytest
import torch
from slow import needs_slow_tests

from imprompt.adapters import create_adapter
from imprompt.bases import load_base
from imprompt.checkpoints import save_adapter
from imprompt.data.columns import default_columns
from imprompt.data.dataset import Columns
from imprompt.data.instruct_scenes import instruct_example
from imprompt.data.instructions import TASKS
from imprompt.data.prepare import prepare
from imprompt.diorama import gallery
from imprompt.evaluation import instruct_table, portraits
from imprompt.evaluation.clip_scores import ClipScores
from imprompt.evaluation.instruct_table import (
    FIXED,
    ONE_INSTRUCTION,
    measure_instruct_table,
    rows_of_task,
    with_fixed_instructions,
)
from imprompt.evaluation.judge import load_judge
from imprompt.evaluation.measure import Sampling

COUNT = 10


@pytest.fixture(scope="module")
def base():
    return load_base("diorama")


@pytest.fixture(scope="module")
def columns(base, tmp_path_factory):
    return Columns.open(
        prepare(
            f"diorama-instruct:{COUNT}",
            tmp_path_factory.mktemp("instruct") / "data",
            base,
            columns=default_columns("instruct-words"),
        )
    )


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_a_task_are_all_of_it_and_no_other(columns, task, tmp_path):
    folder = rows_of_task(columns, task, tmp_path / task)
    own = Columns.open(folder)
    numbers = [n for n in range(COUNT) if instruct_example(n).task == task]
    assert own.names == columns.names and len(own) == len(numbers)
    wanted = columns.rows(numbers, columns.names)
    for name, values in own.rows(range(len(own)), own.names).items():
        assert torch.equal(values, wanted[name]), name
    # What is there is not written again.
    written = (folder / "meta.json").stat().st_mtime_ns
    assert rows_of_task(columns, task, folder) == folder
    assert (folder / "meta.json").stat().st_mtime_ns == written


def test_each_task_gets_its_one_instruction(columns, base, tmp_path):
    own = Columns.open(with_fixed_instructions(columns, base, tmp_path))
    lessons = [instruct_example(n) for n in range(COUNT)]
    told = [FIXED[x.task].replace("{object}", x.condition.kind) for x in lessons]
    rows = own.rows(range(COUNT), own.names)
    assert torch.equal(rows["instruction_ids"], base.tokenize(told).to(rows["instruction_ids"]))
    before = columns.rows(range(COUNT), columns.names)
    assert {name for name in rows if not torch.equal(rows[name], before[name])} == {
        "instruction_ids"
    }


@needs_slow_tests("trains seven adapters for a step and measures twenty rows")
def test_the_table_has_a_row_for_each_model_and_task(base, tmp_path, monkeypatch):
    monkeypatch.setattr(portraits, "gallery", lambda: gallery()[:2])
    monkeypatch.setattr(instruct_table, "ClipScores", partial(ClipScores, num_scenes=24))
    words = create_adapter(
        base.unet, "instruct", feature_dim=160, num_tokens=3, resampler_dim=64, depth=1
    )
    save_adapter(words, tmp_path / "words.safetensors")
    figures = measure_instruct_table(
        partial(load_base, "diorama"),
        load_judge(),
        Sampling(steps=1, guidance_scale=2.0),
        tmp_path / "table",
        count=1,
        num_pairs=10,
        steps=1,
        words=tmp_path / "words.safetensors",
        settings=["train.batch_size=1", "train.validation_rows=1"],
    )
    rows = {name.split(": ")[0] for name in figures}
    of_one = (ONE_INSTRUCTION, f"{ONE_INSTRUCTION}, asked in other words")
    assert rows == {
        f"{task}, {row}" for task in TASKS for row in ("joint", f"{task} alone", *of_one)
    }
    assert all(torch.isfinite(torch.tensor(value)) for value in figures.values())
