"""Lessons of Instruct on the embedded world share exactly what their task keeps; and how they are read."""

import json

import pytest
import torch
from PIL import Image

from imprompt.core.errors import ImpromptError
from imprompt.data.columns import default_columns
from imprompt.data.dataset import Columns
from imprompt.data.instruct_scenes import instruct_example, kept_in_words
from imprompt.data.instructions import TASKS, fault_of
from imprompt.data.prepare import prepare
from imprompt.diorama import phrases, render, sample_scene, subject_caption

COUNT = 40
LAYOUT = ("kind", "placement", "size", "turn_degrees", "camera_degrees", "zoom", "offset", "shape")
KEPT = {
    "everything": (*LAYOUT, "colour", "style", "setting", "character", "seed"),
    "style": ("style",),
    "object": ("kind", "colour", "shape"),
    "composition": (*LAYOUT, "character"),
    "face": ("kind", "character"),
}
CHANGED = {
    "style": ("kind", "colour", "setting", "turn_degrees", "offset"),
    "object": ("style", "setting", "turn_degrees", "zoom", "offset"),
    "composition": ("colour", "style", "setting"),
    "face": ("colour", "style", "setting", "turn_degrees"),
}


def test_lessons_may_be_asked_for_in_the_users_own_words(tmp_path):
    lines = [f"use the {{object}}, please, {number}" for number in range(1000)]
    (tmp_path / "object.txt").write_text("\n".join(lines))
    lessons = [instruct_example(number, "object", tmp_path) for number in range(4)]
    assert any(f"use the {x.condition.kind}, please" in x.instruction for x in lessons)


@pytest.mark.parametrize("task", TASKS)
def test_what_a_task_keeps_is_shared_and_all_else_is_free(task):
    lessons = [instruct_example(number, task) for number in range(COUNT)]
    for lesson in lessons:
        for field in KEPT[task]:
            assert getattr(lesson.condition, field) == getattr(lesson.target, field)
    for field in CHANGED.get(task, ()):
        differ = [getattr(x.condition, field) != getattr(x.target, field) for x in lessons]
        assert sum(differ) > COUNT / 2, field


def test_the_text_says_what_the_image_must_not():
    for number in range(COUNT):
        style = instruct_example(number, "style")
        assert phrases(style.target).subject in style.prompt
        assert phrases(style.target).adverb not in style.prompt
        thing = instruct_example(number, "object")
        assert thing.target.kind not in thing.prompt and thing.target.colour not in thing.prompt
        assert thing.condition.kind in thing.instruction
        layout = instruct_example(number, "composition")
        assert layout.target.colour in layout.prompt
        assert phrases(layout.target).where in layout.prompt
        face = instruct_example(number, "face")
        assert subject_caption(face.target).removeprefix("a person with ") not in face.prompt


def test_tasks_take_turns_and_a_lesson_is_a_function_of_its_number():
    lessons = [instruct_example(number) for number in range(10)]
    assert [lesson.task for lesson in lessons] == [*TASKS, *TASKS]
    assert lessons == [instruct_example(number) for number in range(10)]
    assert lessons[6] == instruct_example(1, "style")
    for lesson in lessons:
        if lesson.task != "object":
            assert fault_of(lesson.instruction, lesson.task) is None
    assert lessons[0].condition == lessons[1].condition
    assert len({lesson.instruction for lesson in map(instruct_example, range(60))}) > 30


def test_what_is_kept_is_said_in_words():
    scene = sample_scene(3, kind="duck", colour="red", style="neon", placement="left", size="large")
    assert kept_in_words("style", scene) == "in neon light"
    assert kept_in_words("object", scene) == "a red duck"
    assert kept_in_words("composition", scene) == "large on the left"
    assert "a large red duck on the left" in kept_in_words("everything", scene)
    said = kept_in_words("face", sample_scene(3, kind="person"))
    assert said.startswith("a person with") and said.endswith("skin")


def test_scenes_that_differ_in_paint_only_are_drawn_as_if_alone():
    lesson = instruct_example(0, "composition")
    both = render([lesson.condition, lesson.target]).pixels
    torch.testing.assert_close(both[1], render([lesson.target]).pixels[0])
    torch.testing.assert_close(both[0], render([lesson.condition]).pixels[0])


def test_prepared_lessons(base, tmp_path):
    folder = prepare("diorama-instruct:10", tmp_path / "all", base, variant="instruct-words")
    data = Columns.open(folder)
    assert set(data.names) == set(default_columns("instruct-words"))
    rows = data.rows(range(10), data.names)
    assert rows["task_ids"].tolist() == [0, 1, 2, 3, 4] * 2
    lesson = instruct_example(6)
    pixels = render([lesson.condition], base.image_size_px).pixels
    expected = base.image_encoder.hidden_states(pixels)[0].half()
    torch.testing.assert_close(rows["condition_states"][6], expected, atol=2e-3, rtol=1e-2)
    for column, text in (
        ("text_ids", lesson.prompt),
        ("instruction_ids", lesson.instruction),
        ("kept_ids", lesson.kept),
    ):
        assert rows[column][6].tolist() == base.tokenize([text])[0].tolist()
    one_task = prepare("diorama-instruct/style:2", tmp_path / "style", base, variant="instruct")
    styles = Columns.open(one_task).rows(range(2), ["text_ids"])["text_ids"]
    assert styles.tolist() == rows["text_ids"][[1, 6]].tolist()
    with pytest.raises(ImpromptError, match="no source of pairs"):
        prepare("diorama-instruct/mood:2", tmp_path / "mood", base, variant="instruct")


def test_pairs_of_ones_own_with_faults(base, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (90 * number, 40, 10)).save(pictures / f"{number}.png")
    good = {"image_file": "0.png", "text": "a dog", "condition_image": "1.png"}
    records = [
        {**good, "instruction": "use the style"},
        {**good, "instruction": "use everything", "task": "everything"},
        {**good, "instruction": "use the style"},
        {**good},
        {**good, "instruction": "use the style", "condition_image": "../secret.png"},
        {**good, "instruction": "use the style", "condition_image": "9.png"},
        {"image_file": "2.png", "text": "alone"},
    ]
    (pictures / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    folder = prepare(str(pictures / "pairs.jsonl"), tmp_path / "out", base, variant="instruct")
    data = Columns.open(folder)
    assert len(data) == 2
    faults = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    kinds = sorted(fault["kind"] for fault in faults)
    assert kinds == [
        "condition missing",
        "condition missing",
        "duplicate",
        "image missing",
        "image outside",
    ]
    plain = prepare(str(pictures / "pairs.jsonl"), tmp_path / "plain", base)
    assert len(Columns.open(plain)) == 2  # 0.png and 2.png: the condition plays no part
