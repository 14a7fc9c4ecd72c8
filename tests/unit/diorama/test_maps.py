"""Control maps mean one thing whatever the scene, and can be read back."""

import pytest
import torch

from imprompt.core.errors import ImpromptError
from imprompt.diorama import MAP_KINDS, draw_maps, render, sample_scene
from imprompt.diorama.maps import KEYPOINT_COLOURS, NEAR, keypoint_map, parts_of_map


@pytest.fixture(scope="module")
def drawn():
    return render([sample_scene(1), sample_scene(6), sample_scene(0, kind="person")], 64)


@pytest.mark.parametrize("kind", MAP_KINDS)
def test_a_map_is_a_picture_of_its_scene_alone(drawn, kind):
    maps = draw_maps(drawn, kind)
    assert maps.shape == (3, 3, 64, 64) and maps.min() >= 0 and 0.3 < maps.max() <= 1
    alone = draw_maps(render([sample_scene(6)], 64), kind)
    torch.testing.assert_close(maps[1:2], alone)


def test_depth_is_the_inverse_distance_and_black_in_the_sky(drawn):
    maps = draw_maps(drawn, "depth")[:, 0]
    sky = drawn.segmentation == 0
    assert sky.any() and not maps[sky].any()
    torch.testing.assert_close(maps[~sky] * drawn.depth[~sky], torch.full_like(maps[~sky], NEAR))


def test_parts_are_read_back_from_a_noisy_segmentation(drawn):
    maps = draw_maps(drawn, "segmentation")
    noisy = maps + 0.03 * torch.randn(maps.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(parts_of_map(noisy), drawn.segmentation)


def test_keypoints_stand_where_they_are():
    points = torch.tensor([[[8.0, 16.0], [20.0, 16.0], [32.0, 16.0], [44.0, 16.0], [56.0, 40.0]]])
    maps = keypoint_map(points, 64)
    for (x, y), colour in zip(points[0].long().tolist(), KEYPOINT_COLOURS, strict=True):
        torch.testing.assert_close(maps[0, :, y, x], torch.tensor(colour))
    assert (maps.amax(1) > 0).float().mean() < 0.04


def test_an_unknown_map(drawn):
    with pytest.raises(ImpromptError, match="no map 'heat'"):
        draw_maps(drawn, "heat")
