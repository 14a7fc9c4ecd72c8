"""The embedded world: a pure function of the seed, with truth that fits its pictures."""

import itertools

import pytest
import torch

from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import generator
from imprompt.diorama import (
    COLOURS,
    KINDS,
    NUM_PHRASINGS,
    OBJECT_KINDS,
    SETTINGS,
    STYLES,
    caption,
    everyday_caption,
    render,
    sample_character,
    sample_scene,
)
from imprompt.diorama.vocabulary import GROUND, MAIN, SKIN


def test_the_world_is_as_rich_as_promised():
    assert len(OBJECT_KINDS) >= 12 and len(COLOURS) >= 8 and len(STYLES) >= 6
    assert len(SETTINGS) >= 4
    assert len(type(sample_character(0)).__dataclass_fields__) >= 6


def test_a_scene_is_a_function_of_its_seed_alone():
    assert sample_scene(7) == sample_scene(7)
    assert sample_scene(7) != sample_scene(8)


def test_fixing_one_field_leaves_the_others():
    free, fixed = sample_scene(11), sample_scene(11, colour="teal")
    assert fixed.colour == "teal"
    assert (fixed.style, fixed.setting, fixed.turn_degrees) == (
        free.style,
        free.setting,
        free.turn_degrees,
    )


@pytest.mark.parametrize("field", [{"kind": "dragon"}, {"colour": "beige"}, {"weather": "rain"}])
def test_what_does_not_exist_is_refused(field):
    with pytest.raises(ImpromptError):
        sample_scene(0, **field)


def test_all_words_appear_about_equally_often():
    kinds = [sample_scene(seed).kind for seed in range(1300)]
    counts = [kinds.count(kind) for kind in KINDS]
    assert min(counts) > 60 and max(counts) < 150


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fills_much_of_the_frame_in_its_colour(kind):
    truth = render([sample_scene(3, kind=kind, size="large")], 64)
    on_object = truth.segmentation > GROUND
    assert 0.08 < on_object.float().mean() < 0.75
    assert (truth.segmentation == MAIN).sum() > (0.1 if kind == "person" else 0.2) * on_object.sum()
    if kind == "person":
        assert (truth.segmentation == SKIN).any()


def test_a_picture_does_not_depend_on_its_neighbours():
    scenes = [sample_scene(seed) for seed in range(6)]
    together = render(scenes, 32).pixels
    alone = torch.cat([render([scene], 32).pixels for scene in scenes])
    torch.testing.assert_close(together, alone, atol=2e-3, rtol=0)


def test_styles_differ_and_pixels_are_in_range():
    scenes = [sample_scene(5, style=style) for style in STYLES]
    pixels = render(scenes, 32).pixels
    assert pixels.min() >= -1 and pixels.max() <= 1
    for one, other in itertools.combinations(pixels, 2):
        assert (one - other).abs().mean() > 0.03


def test_ground_truth_fits_together():
    truth = render([sample_scene(1, kind="mug"), sample_scene(2, kind="house")], 64)
    on_object = truth.segmentation > GROUND
    assert torch.allclose(truth.normals.norm(dim=1)[on_object], torch.ones(()), atol=1e-3)
    assert (truth.depth[on_object] < 8).all() and truth.depth.max() <= 30
    assert truth.edges.min() >= 0 and truth.edges.max() <= 1 and truth.edges.mean() > 0.01


def test_landmarks_lie_on_the_face():
    scene = sample_scene(4, kind="person", turn_degrees=0.0)
    truth = render([scene], 128)
    for x, y in truth.keypoints[0].tolist():
        assert truth.segmentation[0, int(y), int(x)] > GROUND
    left_eye, right_eye, nose, left_mouth, right_mouth = truth.keypoints[0]
    assert left_eye[0] < nose[0] < right_eye[0] and left_mouth[0] < right_mouth[0]
    assert left_eye[1] < nose[1] < left_mouth[1]


def test_the_same_person_in_another_pose_keeps_their_identity():
    person = sample_character(9)
    scenes = [sample_scene(seed, kind="person", character=person) for seed in (1, 2)]
    assert all(scene.character == person for scene in scenes)
    assert scenes[0].turn_degrees != scenes[1].turn_degrees


def test_captions_name_what_is_there():
    scene = sample_scene(6, kind="duck", colour="orange", setting="snow", style="neon")
    phrasings = {caption(scene, i) for i in range(NUM_PHRASINGS)}
    assert len(phrasings) == NUM_PHRASINGS
    assert all("orange" in text and "duck" in text and "neon" in text for text in phrasings)
    assert "an orange duck" in caption(scene)


def test_nothing_to_draw_is_said():
    with pytest.raises(ImpromptError, match="empty"):
        render([], 64)
    with pytest.raises(ImpromptError, match="16"):
        render([sample_scene(0)], 8)


def test_everyday_captions_say_all_or_a_part_and_nothing_else():
    scene = sample_scene(3, kind="duck", colour="orange", style="neon", setting="snow")
    texts = [everyday_caption(scene, generator(0, i, "caption")) for i in range(2000)]
    parts = {"a duck": 0.35, "a duck in the snow": 0.1, "in neon light": 0.15, "in the snow": 0.1}
    for part, share in parts.items():
        assert abs(texts.count(part) / len(texts) - share) < 0.04
    complete = {caption(scene, i) for i in range(NUM_PHRASINGS)}
    assert {text for text in texts if text not in parts} == complete
