"""Maps read off pictures: the network learns, and the figures say what they should."""

import pytest
import torch

from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.core.shipped import ADAPTERS, shipped
from imprompt.diorama import MAP_KINDS, draw_maps, render, sample_scene
from imprompt.diorama.maps import depth_map, keypoint_map, keypoints_of_map
from imprompt.encoders.face_network import load_face_network
from imprompt.evaluation.judge import load_judge
from imprompt.evaluation.map_reader import compare, edge_f1, load_map_reader, part_iou, read_maps
from imprompt.systems.map_reader import MapReader, MapReaderSystem, MapReading


@pytest.fixture(scope="module")
def drawn():
    return render([sample_scene(seed) for seed in range(6)], 64)


def perfect(drawn) -> MapReading:
    points, _ = keypoints_of_map(keypoint_map(drawn.keypoints, 64))
    parts = torch.nn.functional.one_hot(drawn.segmentation, 11).permute(0, 3, 1, 2).float()
    return MapReading(depth_map(drawn.depth)[:, 0], drawn.edges, parts, points)


def test_a_perfect_reading_has_perfect_figures(drawn):
    figures = compare(perfect(drawn), drawn)
    assert figures["depth error"] == 0 and figures["keypoint error"] == 0
    for name in ("edge F1", "segmentation IoU", "object IoU"):
        assert figures[name] == pytest.approx(1)


def test_a_shift_is_measured(drawn):
    exact = perfect(drawn)
    moved = MapReading(
        exact.depth.roll(6, 2), exact.edges.roll(6, 2), exact.parts.roll(6, 3), exact.keypoints + 6
    )
    figures = compare(moved, drawn)
    assert figures["keypoint error"] == pytest.approx(6 * 2**0.5, abs=1e-4)
    assert figures["depth error"] > 3
    assert figures["edge F1"] < 0.6 and 0.3 < figures["object IoU"] < 0.9


def test_a_line_beside_a_line_counts_and_two_pixels_off_does_not():
    lines = torch.zeros(1, 16, 16, dtype=torch.bool)
    lines[:, 8] = True
    assert edge_f1(lines.roll(1, 1), lines) == 1
    assert edge_f1(lines.roll(3, 1), lines) == 0
    half = lines.clone()
    half[:, :, 8:] = False
    assert edge_f1(half, lines) == pytest.approx(2 / 3, abs=0.06)


def test_iou_is_over_the_parts_that_were_asked_for():
    asked = torch.zeros(1, 4, 4, dtype=torch.int64)
    asked[:, :2] = 3
    found = torch.zeros_like(asked)
    assert part_iou(found, asked) == pytest.approx(0.25)


def test_keypoints_are_found_again_unless_hidden():
    points = torch.tensor([[[10.0, 10.0], [30.5, 20.25], [50.0, 10.0], [50.0, 50.0], [50.0, 50.0]]])
    found, seen = keypoints_of_map(keypoint_map(points, 64))
    assert seen.tolist() == [[True, True, True, False, True]]
    torch.testing.assert_close(found[seen], points[seen], atol=0.25, rtol=0)


def test_the_reader_learns(drawn, tmp_path):
    batch = {"pixels": ((drawn.pixels + 1) * 127.5).round().to(torch.uint8)}
    for kind in MAP_KINDS:
        batch[f"control_{kind}"] = (draw_maps(drawn, kind) * 255).round().to(torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        system = MapReaderSystem(MapReader(width=8))
    optimizer = torch.optim.Adam(system.module.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        loss, figures = system.loss(batch, Randomness(0, range(6)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert set(figures) == {"depth", "edges", "parts", "keypoints"}
    system.module.eval()
    system.export(tmp_path / "reader.safetensors")
    again = read_maps(load_map_reader(tmp_path / "reader.safetensors"), drawn.pixels)
    expected = read_maps(system.module, drawn.pixels)
    torch.testing.assert_close(again.depth, expected.depth, atol=0.02, rtol=0)
    with pytest.raises(ImpromptError, match="no map reader"):
        load_map_reader(tmp_path / "none.safetensors")
    for load in (load_map_reader, load_judge, load_face_network):
        with pytest.raises(ImpromptError, match="adapter.safetensors is no"):
            load(shipped(ADAPTERS["diorama"]))
    (tmp_path / "damaged.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ImpromptError, match="damaged.safetensors is no judge"):
        load_judge(tmp_path / "damaged.safetensors")
