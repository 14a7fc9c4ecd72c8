"""Lessons of Instruct from a user's own pictures, and the list of pairs they become."""

import json

import numpy as np
import pytest
from PIL import Image

from imprompt.core.errors import ImpromptError
from imprompt.data.dataset import Columns
from imprompt.data.instruct_builders import (
    composition_lesson,
    edges,
    everything_lesson,
    face_lessons,
    object_lesson,
    style_lesson,
    write_lessons,
)
from imprompt.data.instructions import TASKS, fault_of, filled
from imprompt.data.prepare import prepare


def photo(number, size=(60, 40)):
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def square_on_black():
    image = Image.new("RGB", (64, 64))
    image.paste((250, 250, 250), (20, 24, 44, 48))
    return image


def test_an_object_is_cut_out_by_a_box():
    lesson = object_lesson(square_on_black(), "a square at night", "square", box=(20, 24, 44, 44))
    assert lesson.condition.size == (24, 24)
    assert lesson.condition.getpixel((12, 12)) == (250, 250, 250)
    assert lesson.condition.getpixel((12, 0)) == lesson.condition.getpixel((12, 23))
    assert lesson.condition.getpixel((12, 0)) != (0, 0, 0)
    assert "square" in lesson.instruction and lesson.target.size == (64, 64)


def test_an_object_is_cut_out_by_a_mask_on_a_coloured_ground():
    image, mask = square_on_black(), Image.new("L", (64, 64))
    mask.paste(255, (20, 24, 44, 48))
    mask.paste(0, (20, 24, 30, 30))
    lesson = object_lesson(image, "a square", "square", mask=mask)
    assert lesson.condition.getpixel((20, 20)) == (250, 250, 250)
    assert lesson.condition.getpixel((2, 2)) not in ((0, 0, 0), (250, 250, 250))
    others = {
        object_lesson(image, "", "square", mask=mask, seed=i).condition.getpixel((2, 2))
        for i in range(5)
    }
    assert len(others) == 5


def test_mistakes_with_objects_are_told():
    image = square_on_black()
    with pytest.raises(ImpromptError, match="give one of them"):
        object_lesson(image, "", "square")
    with pytest.raises(ImpromptError, match="not in the picture"):
        object_lesson(image, "", "square", box=(40, 40, 90, 90))
    with pytest.raises(ImpromptError, match="Nothing is white"):
        object_lesson(image, "", "square", mask=Image.new("L", (64, 64)))
    with pytest.raises(ImpromptError, match="The mask is of"):
        object_lesson(image, "", "square", mask=Image.new("L", (6, 6)))


def test_a_layout_is_shown_by_its_edges_or_drawn_anew():
    found = np.asarray(edges(square_on_black()).convert("L"))
    assert found[24, 30] == 255 and found[34, 30] == 0 and found[0].max() == 0
    asked = []

    def redraw(outlines, text):
        asked.append((outlines, text))
        return photo(1)

    plain = composition_lesson(square_on_black(), "a box")
    drawn = composition_lesson(
        square_on_black(), "a box", redraw=redraw, other_caption="a red tower"
    )
    assert np.array_equal(np.asarray(plain.condition), np.asarray(asked[0][0]))
    assert asked[0][1] == "a red tower" and drawn.condition.size == (60, 40)


def test_faces_are_shown_by_another_photo_half_of_them_zoomed():
    photos = [(photo(i), f"caption {i}") for i in range(20)]
    lessons = list(face_lessons(photos))
    assert [lesson.prompt for lesson in lessons] == [caption for _, caption in photos]
    zoomed = [lesson for lesson in lessons if lesson.condition.size != (60, 40)]
    assert 5 <= len(zoomed) <= 15
    assert all(lesson.condition.width == lesson.condition.height for lesson in zoomed)
    for number, lesson in enumerate(lessons):
        if lesson not in zoomed:
            assert lesson.condition is photos[(number + 1) % 20][0]
    with pytest.raises(ImpromptError, match="two photos"):
        list(face_lessons(photos[:1]))


def told(pictures, folder=None):
    """Of each task the instructions of lessons of these pictures, all with the same texts."""
    asked = {"folder": folder}
    made = [
        lesson
        for picture in pictures
        for lesson in (
            everything_lesson(picture, "a", **asked),
            object_lesson(picture, "a", "cup", box=(20, 10, 40, 30), **asked),
            composition_lesson(picture, "a", **asked),
            style_lesson(picture, lambda image, text: image, "a", **asked),
        )
    ]
    for one, two in twos(pictures):
        made += face_lessons([(one, "a"), (two, "a")], **asked)
    return {task: [x.instruction for x in made if x.task == task] for task in TASKS}


def twos(pictures):
    return zip(pictures[::2], pictures[1::2], strict=True)


def test_other_pictures_get_other_lessons_and_the_same_the_same_again():
    pictures = [photo(number) for number in range(60)]
    found = told(pictures)
    for task, instructions in found.items():
        # Of 60 draws among 60 wordings some 38 differ.
        assert len(set(instructions)) > 25, task
    assert told([picture.copy() for picture in pictures]) == found


def test_other_pictures_get_other_grounds():
    mask = Image.new("L", (60, 40))
    mask.paste(255, (20, 10, 40, 30))
    mask.paste(0, (20, 10, 25, 15))
    corners = {
        object_lesson(photo(number), "a", "cup", mask=mask).condition.getpixel((0, 0))
        for number in range(30)
    }
    assert len(corners) == 30


def test_two_objects_of_a_picture_are_asked_for_in_other_words():
    boxes = [(left, 10, left + 20, 30) for left in range(40)]
    lessons = [object_lesson(photo(0), "a", "cup", box=box) for box in boxes]
    assert len({lesson.instruction for lesson in lessons}) > 20


def test_of_many_persons_with_two_photos_each_half_are_zoomed():
    photos = [(photo(number), "a person") for number in range(80)]
    lessons = [lesson for two in twos(photos) for lesson in face_lessons(two)]
    zoomed = sum(lesson.condition.size != (60, 40) for lesson in lessons)
    assert 25 <= zoomed <= 55


def test_lessons_are_asked_for_in_the_users_own_words_too(tmp_path):
    own = {
        "everything": "everything, in my words",
        "object": "the {object}, in my words",
        "composition": "the composition, in my words",
        "style": "the style, in my words",
        "face": "the face, in my words",
    }
    for task, line in own.items():
        (tmp_path / f"{task}.txt").write_text("\n".join(f"{line}, {i}" for i in range(100)))
    for task, instructions in told([photo(number) for number in range(20)], tmp_path).items():
        words = filled(own[task], "cup")
        assert any(line.startswith(words) for line in instructions), task


def test_lessons_become_data(base, tmp_path):
    styled = style_lesson(photo(2), lambda image, text: photo(3), "a boat", kept="in oil")
    lessons = [
        everything_lesson(photo(0), "a beach"),
        object_lesson(square_on_black(), "a square", "square", box=(20, 24, 44, 48)),
        composition_lesson(photo(1), "a tower", kept="small on the left"),
        styled,
    ]
    for lesson in lessons:
        if lesson.task != "object":
            assert fault_of(lesson.instruction, lesson.task) is None
    write_lessons(lessons, tmp_path / "own")
    person = face_lessons([(photo(4), "he"), (photo(5), "him")], kept="a man with red hair")
    listed = write_lessons(person, tmp_path / "own")
    records = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [r["task"] for r in records] == [
        "everything",
        "object",
        "composition",
        "style",
        "face",
        "face",
    ]
    data = Columns.open(prepare(str(listed), tmp_path / "data", base, variant="instruct-words"))
    rows = data.rows(range(6), ["task_ids", "kept_ids"])
    assert rows["task_ids"].tolist() == [0, 2, 3, 1, 4, 4]
    kept = ["a beach", "a square", "small on the left", "in oil", *["a man with red hair"] * 2]
    assert rows["kept_ids"].tolist() == base.tokenize(kept).tolist()


def test_lessons_without_words_for_what_is_kept_teach_no_words(base, tmp_path):
    lessons = [
        composition_lesson(photo(0), "a tower"),
        composition_lesson(photo(1), "a tower", kept="small on the left"),
    ]
    listed = str(write_lessons(lessons, tmp_path / "own"))
    words = prepare(listed, tmp_path / "words", base, variant="instruct-words")
    assert len(Columns.open(words)) == 1
    fault = json.loads((words / "quarantine.jsonl").read_text())
    assert fault["kind"] == "kept missing" and '"kept" is missing' in fault["reason"]
    data = prepare(listed, tmp_path / "data", base, variant="instruct")
    assert len(Columns.open(data)) == 2
    with pytest.raises(ImpromptError, match="has a row already, but no words for what is"):
        prepare(listed, tmp_path / "data", base, columns=("kept_ids",))
