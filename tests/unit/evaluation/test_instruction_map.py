"""The map of instructions: points, how far tasks stand apart, and the picture."""

import numpy as np
import pytest
from PIL import Image
from slow import needs_slow_tests

from imprompt.bases import load_base
from imprompt.data.instructions import TASKS
from imprompt.evaluation import instruction_map
from imprompt.evaluation.instruction_map import (
    COLOURS,
    all_instructions,
    draw_points,
    instruction_points,
    map_instructions,
    nearest_share,
)


def test_neighbours_of_one_task_count():
    points = np.array([[0.0, 0], [0, 1], [9, 0], [9, 1]])
    assert nearest_share(points, [0, 0, 1, 1]) == 1.0
    assert nearest_share(points, [0, 1, 0, 1]) == 0.0


def test_the_users_own_are_on_the_map(tmp_path):
    (tmp_path / "style.txt").write_text("use this style, please\n")
    texts, tasks = all_instructions(tmp_path)
    assert len(texts) == len(all_instructions()[0]) + 1
    assert TASKS[tasks[texts.index("use this style, please")]] == "style"


def test_every_task_is_drawn_in_its_colour():
    points = np.random.default_rng(0).normal(size=(10, 2))
    image = draw_points(points, [0, 1, 2, 3, 4] * 2)
    found = {colour for _, colour in image.getcolors(1 << 20)}
    assert set(COLOURS) <= found


def test_the_map_is_drawn_and_measured(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    texts, tasks = all_instructions()
    monkeypatch.setattr(instruction_map, "all_instructions", lambda *_: (texts[::12], tasks[::12]))
    figures = map_instructions(load_base("diorama"), tmp_path / "map")
    assert list(figures) == ["nearest neighbour is of the same task"]
    assert 0.2 < figures["nearest neighbour is of the same task"] <= 1.0
    with Image.open(tmp_path / "map" / "instructions.png") as picture:
        assert set(COLOURS) <= {colour for _, colour in picture.getcolors(1 << 20)}


@needs_slow_tests("computes a t-SNE")
def test_instructions_of_a_task_lie_together():
    pytest.importorskip("sklearn")
    texts, tasks = all_instructions()
    points = instruction_points(load_base("diorama"), texts)
    assert points.shape == (len(texts), 2)
    assert nearest_share(points, tasks) > 0.6
