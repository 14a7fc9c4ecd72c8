"""That a picture looks to the image encoder as another does, as a loss."""

from dataclasses import replace

import pytest
import torch
from tiny_base import write_tiny_base

from imprompt.bases import image_encoder_of, load_base
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns
from imprompt.data.instructions import TASKS
from imprompt.data.prepare import prepare
from imprompt.systems import instruct
from imprompt.systems.instruct_options import InstructOptions
from imprompt.systems.resemblance import Resemblance, resemblance_for

OPTIONS = InstructOptions(
    num_tokens=3,
    resampler_dim=64,
    depth=1,
    drop_image=0.0,
    drop_text=0.0,
    drop_instruction=0.0,
    drop_text_and_instruction=0.0,
    drop_all=0.0,
    resemblance=0.5,
    drawn_steps=3,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resemblance")
    write_tiny_base(folder / "base", image_encoder=True)
    base = load_base(folder / "base")
    prepare("diorama-instruct:10", folder / "data", base, variant="instruct-faces")
    return folder


@pytest.fixture
def base(folder):
    return load_base(folder / "base")


@pytest.fixture
def columns(folder):
    return Columns.open(folder / "data")


def test_it_can_be_learnt_what_the_encoder_sees(base):
    """By steps on the latents alone pictures come to look as others do."""
    encoder = image_encoder_of(base)
    generator = torch.Generator().manual_seed(0)
    wanted, latents = torch.randn(2, 3, *base.latent_shape(), generator=generator)
    pixels = base.decode_image(wanted)
    states = encoder.hidden_states(pixels.clamp(-1, 1))
    torch.testing.assert_close(encoder.read(pixels), states)
    resemblance = Resemblance(base, states)
    of_states = resemblance.varying(states)
    assert resemblance.likeness.distance(wanted, of_states).abs().max() < 1e-4
    latents.requires_grad_(True)
    optimizer = torch.optim.Adam([latents], lr=0.05)
    distances = []
    for _ in range(30):
        distance = resemblance.likeness.distance(latents, of_states)
        optimizer.zero_grad()
        distance.sum().backward()
        optimizer.step()
        distances.append(distance.detach())
    assert (distances[-1] < 0.6 * distances[0]).all()
    assert all(weight.grad is None for weight in encoder.parameters())


def test_what_all_pictures_have_says_nothing(base, columns):
    resemblance = resemblance_for(columns, base, 1.0)
    assert resemblance is not None and resemblance_for(columns, base, 0.0) is None
    states = columns.rows(range(10), ("condition_states",))["condition_states"].float()
    varying = resemblance.varying(states)
    assert varying.mean(0).abs().max() < 1e-2
    squares = varying.unflatten(1, states.shape[1:]).square()
    torch.testing.assert_close(squares.mean((0, 1)), torch.ones(states.shape[2]))


def test_it_is_of_lessons_of_everything_that_are_told_and_shown(base, columns):
    batch = columns.rows(range(10), instruct.build(OPTIONS, base, columns).columns)
    is_everything = batch["task_ids"] == TASKS.index("everything")
    assert is_everything.sum() == 2

    def of(given, rows=range(10), **changed):
        system = instruct.build(replace(OPTIONS, **changed), base, columns)
        some = {name: values[list(rows)] for name, values in given.items()}
        return system.loss(some, Randomness(0, rows))

    loss, figures = of(batch)
    found = pytest.approx(figures["loss_of_resemblance"].item(), rel=1e-5)
    assert figures["loss_of_resemblance"] > 0
    both = figures["loss_of_noise"] + 0.5 * figures["loss_of_resemblance"]
    assert loss.item() == pytest.approx(both.item())

    def others(name, where):
        other = torch.where(
            where.reshape(-1, *[1] * (batch[name].ndim - 1)), batch[name].flip(0), batch[name]
        )
        return of({**batch, name: other})[1]["loss_of_resemblance"].item()

    for name in ("condition_states", "instruction_ids"):
        assert others(name, is_everything) != found
        assert others(name, ~is_everything) == found
    # It is drawn from noise, without text.
    for name in ("latent_mean", "text_ids"):
        assert others(name, is_everything) == found
    assert of(batch, drawn_steps=0)[1]["loss_of_resemblance"].item() != found
    parts = [of(batch, rows)[1]["loss_of_resemblance"] for rows in (range(5), range(5, 10))]
    assert (sum(parts) / 2).item() == found
    for name in ("drop_image", "drop_instruction", "drop_all"):
        assert of(batch, **{name: 1.0})[1]["loss_of_resemblance"] == 0


def test_beside_likeness_each_is_of_its_own_lessons(base, columns):
    both = replace(OPTIONS, likeness=1.0)
    system = instruct.build(both, base, columns)
    batch = columns.rows(range(10), system.columns)
    figures = system.loss(batch, Randomness(0, range(10)))[1]
    assert figures["loss_of_likeness"] > 0
    alone = instruct.build(OPTIONS, base, columns).loss(batch, Randomness(0, range(10)))[1]
    of_resemblance = alone["loss_of_resemblance"]
    assert figures["loss_of_resemblance"] == pytest.approx(of_resemblance.item(), rel=1e-5)


def test_data_that_do_not_tell_tasks_are_refused(base, tmp_path):
    prepare("diorama-instruct:5", tmp_path / "data", base, variant="instruct")
    with pytest.raises(ImpromptError, match="task_ids"):
        instruct.build(OPTIONS, base, Columns.open(tmp_path / "data"))
