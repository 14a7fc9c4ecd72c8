"""Portraits learnt by the text-to-image model: what else it draws is held, and a face network looks at them."""

import pytest
import torch

from imprompt.bases import load_base
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns, ColumnsWriter
from imprompt.diorama import KINDS, caption, render, sample_scene
from imprompt.diorama.people import portrait, training_character
from imprompt.systems import text_to_image
from imprompt.systems.perceptual import portrait_look
from imprompt.systems.text_to_image import TextToImageOptions

NUM_PORTRAITS = 4


@pytest.fixture
def base():
    return load_base("diorama")


@pytest.fixture(scope="module")
def columns(tmp_path_factory):
    """Portraits, and then as many scenes without a person."""
    base = load_base("diorama")
    persons = [portrait(seed, training_character(seed)) for seed in range(NUM_PORTRAITS)]
    others = [sample_scene(seed, kind="duck") for seed in range(NUM_PORTRAITS)]
    scenes = persons + others
    folder = tmp_path_factory.mktemp("data")
    writer = ColumnsWriter(folder)
    with torch.no_grad():
        writer.write(
            0,
            {
                "latents": base.encode_image(render(scenes, 64).pixels),
                "phrasing_ids": base.tokenize([caption(s, 0) for s in scenes])[:, None],
                "labels": torch.tensor([[KINDS.index(s.kind), 0, 0, 0] for s in scenes]),
            },
        )
    writer.finish(len(scenes), {"encoders_fingerprint": base.encoders_fingerprint()})
    return Columns.open(folder)


def learnt(base, columns, rows, **options):
    """The system after some steps on these rows, and the figures of the first step and the last."""
    system = text_to_image.build(TextToImageOptions(start="base", **options), base, columns)
    batch = columns.rows(rows, system.columns)
    optimizer = torch.optim.Adam(system.module.parameters(), lr=3e-4)
    told = []
    for _ in range(6):
        loss, figures = system.loss(batch, Randomness(0, rows))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        told.append({name: float(value) for name, value in figures.items()})
    return system, told[0], told[-1]


def test_what_is_held_moves_less(base, columns):
    moved = []
    for hold in (0.01, 20.0):
        system, first, last = learnt(load_base("diorama"), columns, range(8), hold=hold)
        assert first["loss_of_hold"] == pytest.approx(0, abs=1e-6)
        moved.append(last["loss_of_hold"])
    assert 0 < moved[1] < 0.5 * moved[0]
    assert not any(p.requires_grad for p in system._before.parameters())


def test_portraits_are_not_held(base, columns):
    _, _, last = learnt(base, columns, range(NUM_PORTRAITS), hold=20.0)
    assert last["loss_of_hold"] == 0


def test_a_face_network_looks_at_portraits_alone(base, columns):
    objects = range(NUM_PORTRAITS, 2 * NUM_PORTRAITS)
    _, first, _ = learnt(load_base("diorama"), columns, objects, perceptual=1.0)
    assert first["loss_of_portraits"] == 0
    _, first, last = learnt(base, columns, range(NUM_PORTRAITS), perceptual=10.0)
    assert last["loss_of_portraits"] < first["loss_of_portraits"]


def test_a_portrait_is_like_itself_and_unlike_another(base, columns):
    look = portrait_look(base)
    true = columns.rows(range(NUM_PORTRAITS), ["latents"])["latents"].float()
    assert look.distance(true, true).abs().max() < 1e-5
    other = true.roll(1, 0).requires_grad_()
    blurred = 0.7 * true + 0.3 * other
    assert (look.distance(other, true) > look.distance(blurred, true)).all()
    look.distance(other, true).sum().backward()
    assert other.grad is not None and other.grad.abs().sum() > 0


def test_what_options_need_is_checked(base, tmp_path):
    with pytest.raises(ImpromptError, match='needs start="base"'):
        TextToImageOptions(hold=1.0)
    writer = ColumnsWriter(tmp_path)
    writer.write(0, {"latents": torch.zeros(1, 8, 16, 16)})
    writer.finish(1, {"encoders_fingerprint": base.encoders_fingerprint()})
    for options in ({"hold": 1.0}, {"perceptual": 1.0}):
        with pytest.raises(ImpromptError, match="labels"):
            text_to_image.build(
                TextToImageOptions(start="base", **options), base, Columns.open(tmp_path)
            )
