"""The face encoder's loss, and that training it teaches to tell persons apart."""

import math

import pytest
import torch
from tiny_base import write_tiny_base

from imprompt.bases import load_base
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns, ColumnsWriter
from imprompt.encoders.face_network import load_face_network
from imprompt.systems.face_encoder import (
    FaceEncoderOptions,
    FaceEncoderSystem,
    build,
    varied,
    with_margin,
)


def test_the_margin_is_an_angle_on_the_own_person_only():
    angles = torch.tensor([[0.4, 1.2], [1.0, 0.2], [3.0, 0.1]])
    cosines = angles.cos()
    moved = with_margin(cosines, torch.tensor([0, 1, 0]), 0.3)
    torch.testing.assert_close(moved[0], torch.tensor([math.cos(0.7), math.cos(1.2)]))
    torch.testing.assert_close(moved[1], torch.tensor([math.cos(1.0), math.cos(0.5)]))
    assert moved[2, 0] < cosines[2, 0]  # beyond π - m, still harder, not easier
    own = torch.linspace(-1, 1, 200)[:, None]
    assert (with_margin(own, torch.zeros(200, dtype=torch.long), 0.5).diff(dim=0) >= -1e-3).all()


def test_landmarks_move_with_the_picture():
    pixels = torch.full((8, 3, 64, 64), -1.0)
    landmarks = 0.35 + 0.3 * torch.rand(8, 5, 2)
    for picture, places in zip(pixels, landmarks, strict=True):
        x, y = (places[2] * 64).long().tolist()
        picture[:, y - 1 : y + 2, x - 1 : x + 2] = 1.0
        places[2] = torch.tensor([x + 0.5, y + 0.5]) / 64
    moved, places = varied(pixels, {"landmarks": landmarks}, Randomness(0, range(8)))
    weight = (moved.mean(1).clamp(min=0.3) - 0.3).flatten(1)
    weight = weight / weight.sum(1, keepdim=True)
    axis = (torch.arange(64) + 0.5) / 64
    y, x = (v.flatten() for v in torch.meshgrid(axis, axis, indexing="ij"))
    found = torch.stack([(weight * x).sum(1), (weight * y).sum(1)], 1)
    assert ((found - places[:, 2]) * 64).norm(dim=1).max() < 0.7
    left, right = places[:, 0], places[:, 1]
    mirrored = Randomness(0, range(8)).uniform("mirror") < 0.5
    assert mirrored.any() and not mirrored.all()
    same_side = (left[:, 0] < right[:, 0]) == (landmarks[:, 0, 0] < landmarks[:, 1, 0])
    assert same_side.all()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(write_tiny_base(tmp_path_factory.mktemp("base") / "tiny"))


@pytest.fixture
def columns(tmp_path):
    """Three "persons", each of a colour."""
    count = 24
    generator = torch.Generator().manual_seed(0)
    person = torch.arange(count) % 3
    pixels = torch.randint(0, 60, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(count), person] += 150
    (tmp_path / "data").mkdir()
    writer = ColumnsWriter(tmp_path / "data")
    landmarks = torch.full((count, 5, 2), 0.5)
    writer.write(0, {"pixels": pixels, "character": person * 1000 + 7, "landmarks": landmarks})
    writer.finish(count, {})
    return Columns.open(tmp_path / "data")


def test_it_learns_and_writes_what_can_be_loaded(base, columns, tmp_path):
    torch.manual_seed(0)
    system = build(FaceEncoderOptions(width=4, embed_dim=8), base, columns)
    batch = columns.rows(range(24), system.columns)
    optimizer = torch.optim.AdamW(system.module.parameters(), lr=1e-2)
    losses = []
    for step in range(12):
        loss, figures = system.loss(batch, Randomness(0, range(step * 24, step * 24 + 24)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    system.module.eval()
    figures = system.validate(batch, Randomness(1, range(24)))
    assert figures["nearest_is_same"] > 0.9
    system.export(tmp_path / "face.safetensors")
    network = load_face_network(tmp_path / "face.safetensors")
    pixels = batch["pixels"].float() / 127.5 - 1
    with torch.no_grad():
        expected, actual = system.module.network(pixels)[0], network(pixels)[0]
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)

    start = FaceEncoderOptions(start_from=str(tmp_path / "face.safetensors"))
    again = build(start, base, columns)
    again.module.eval()
    _, figures = again.loss(batch, Randomness(2, range(24)))
    assert figures["right"] > 0.9  # for it knows the persons' directions from the first step


def test_one_person_cannot_be_told_apart(base, tmp_path):
    (tmp_path / "data").mkdir()
    writer = ColumnsWriter(tmp_path / "data")
    writer.write(0, {"character": torch.tensor([5, 5])})
    writer.finish(2, {})
    with pytest.raises(ImpromptError, match="shows one person"):
        build(FaceEncoderOptions(), base, Columns.open(tmp_path / "data"))


def test_it_is_a_system():
    from imprompt.systems.protocol import System

    network = torch.nn.Identity()
    system = FaceEncoderSystem(network, torch.tensor([1, 2]), FaceEncoderOptions())
    assert isinstance(system, System)
