"""The measurement of Instruct: what is asked, what is read off renders, layouts, CLIP scores."""

import pytest
from slow import needs_slow_tests

from imprompt.adapters import create_adapter
from imprompt.bases import load_base
from imprompt.data.instructions import TASKS
from imprompt.diorama import phrases, render
from imprompt.evaluation.clip_scores import ClipScores, mean_cosine
from imprompt.evaluation.instruct import (
    judged,
    layout_figures,
    layout_limits,
    measure_task,
    unseen_lessons,
)
from imprompt.evaluation.instruct_table import fixed
from imprompt.evaluation.judge import load_judge
from imprompt.evaluation.map_reader import load_map_reader
from imprompt.evaluation.measure import Sampling

COUNT = 16
slow = needs_slow_tests("draws hundreds of scenes")


@pytest.fixture(scope="module")
def base():
    return load_base("diorama")


@slow
@pytest.mark.parametrize("task", TASKS)
def test_renders_of_what_was_asked_for_get_full_marks(task):
    lessons = unseen_lessons(task, COUNT)
    targets = render([lesson.target for lesson in lessons]).pixels
    figures = judged(load_judge(), task, lessons, targets)
    assert all(share >= 0.8 for share in figures.values()), figures
    if task == "composition":
        reader = load_map_reader()
        true = layout_figures(reader, targets, lessons)["layout IoU"]
        others = unseen_lessons("object", COUNT)
        strange = render([lesson.target for lesson in others]).pixels
        assert true > 0.8
        assert layout_figures(reader, strange, lessons)["layout IoU"] < true - 0.2


def test_the_text_says_what_is_measured_as_following_it():
    for lesson in unseen_lessons("object", 4):
        said = phrases(lesson.target)
        assert said.where in lesson.prompt and said.adverb in lesson.prompt
        assert lesson.condition.kind in lesson.instruction
    for lesson in unseen_lessons("style", 4):
        assert phrases(lesson.target).subject in lesson.prompt
    assert {lesson.prompt for lesson in unseen_lessons("everything", 4)} == {""}
    for lesson in unseen_lessons("face", 4):
        assert lesson.condition.character == lesson.target.character


def test_a_model_of_one_instruction_is_asked_in_its_own_words():
    lessons = unseen_lessons("object", 3)
    for lesson, asked in zip(lessons, fixed(lessons), strict=True):
        assert asked.instruction == f"use the {lesson.condition.kind}"
        assert (asked.condition, asked.prompt) == (lesson.condition, lesson.prompt)


def test_layouts_lie_between_the_texts_and_those_of_true_renders(base):
    found = layout_limits(base, Sampling(steps=8, sampler="dpm-solver++"), count=4)
    names = ("layout IoU of the text alone", "layout IoU of true renders")
    assert set(names) < set(found)
    assert 0 < found[names[0]] < found[names[1]] - 0.1


@slow
def test_clip_scores_know_captions_of_renders(base):
    clip = ClipScores(base, num_scenes=48)
    lessons = unseen_lessons("style", 12)
    pictures = clip.of_images(render([lesson.target for lesson in lessons]).pixels)
    texts = clip.of_texts([lesson.prompt for lesson in lessons])
    assert mean_cosine(pictures, texts) > mean_cosine(pictures, texts.roll(1, 0)) + 0.1


@slow
def test_a_task_is_drawn_and_measured(base):
    adapter = create_adapter(base.unet, "instruct", feature_dim=160, resampler_dim=64, depth=1)
    sampling = Sampling(steps=2, guidance_scale=2.0)
    result = measure_task(base, adapter, load_judge(), sampling, "object", count=2)
    assert result.images.shape == (2, 3, 64, 64)
    assert set(result.figures) == {
        "kept: kind",
        "kept: colour",
        "kept: all at once",
        "text: style",
        "text: setting",
        "text: all at once",
    }
