"""Instruct's beginning for faces: tokens learn to say who is seen, and go on saying what they said."""

from dataclasses import replace

import pytest
import torch
from tiny_base import write_tiny_base

from imprompt.adapters import add_lora, create_adapter
from imprompt.bases import load_base
from imprompt.checkpoints import load_adapter, save_adapter
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns
from imprompt.data.instructions import TASKS
from imprompt.data.prepare import prepare
from imprompt.systems import instruct_faces
from imprompt.systems.instruct_faces import InstructFacesOptions

COUNT = 20
FACE = TASKS.index("face")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instruct-faces")
    write_tiny_base(folder / "base", image_encoder=True)
    base = load_base(folder / "base")
    prepare(f"diorama-instruct:{COUNT}", folder / "data", base, variant="instruct-faces")
    adapter = create_adapter(
        base.unet, "instruct", feature_dim=24, num_tokens=3, resampler_dim=64, depth=1, seed=1
    )
    known = {"base_fingerprint": base.fingerprint()}
    save_adapter(add_lora(adapter, base.unet, 2), folder / "old.safetensors", known)
    return folder


@pytest.fixture
def options(folder):
    return InstructFacesOptions(start_from=str(folder / "old.safetensors"), drop_text=0.0)


@pytest.fixture
def columns(folder):
    return Columns.open(folder / "data")


@pytest.fixture
def base(folder):
    return load_base(folder / "base")


def test_vectors_are_of_lessons_of_faces_alone(columns):
    rows = columns.rows(range(COUNT), ("id_embeds", "task_ids"))
    of_face = rows["task_ids"] == FACE
    assert of_face.sum() == COUNT / len(TASKS)
    lengths = rows["id_embeds"].float().norm(dim=1)
    torch.testing.assert_close(lengths, of_face.float(), atol=1e-2, rtol=0)


def test_who_is_seen_is_learnt_and_the_other_tasks_say_what_they_said(
    folder, base, columns, options, tmp_path
):
    torch.manual_seed(0)
    system = instruct_faces.build(options, base, columns)
    batch, randomness = columns.rows(range(COUNT), system.columns), Randomness(0, range(COUNT))
    before = system.validate(batch, randomness)
    assert before["lost_of_before"] == pytest.approx(0, abs=1e-6)
    optimizer = torch.optim.Adam(system.module.parameters(), lr=3e-3)
    for _ in range(60):
        loss, figures = system.loss(batch, randomness)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx((figures["lost"] + figures["unlike"]).item())
    after = system.validate(batch, randomness)
    assert after["unlike"] < 0.5 * before["unlike"]
    assert after["lost_of_before"] < 0.1

    system.export(tmp_path / "new.safetensors")
    old, new = load_adapter(folder / "old.safetensors"), load_adapter(tmp_path / "new.safetensors")
    assert new.lora_rank == 2 and new.num_tokens == 3
    changed = {
        name for name, value in new.state_dict().items() if not value.equal(old.state_dict()[name])
    }
    assert changed and all(name.startswith("image_proj.") for name in changed)


def test_the_tokens_and_not_the_map_alone_learn_it(base, columns, options):
    system = instruct_faces.build(options, base, columns)
    loss, _ = system.loss(columns.rows(range(COUNT), system.columns), Randomness(0, range(COUNT)))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in system.module.parameters())
    learnt = {name for name, p in system.adapter.named_parameters() if p.grad is not None}
    assert learnt and all(name.startswith("image_proj.") for name in learnt)


def test_only_faces_are_read_and_all_rows_are_held(base, columns, options):
    system = instruct_faces.build(options, base, columns)
    batch, randomness = columns.rows(range(COUNT), system.columns), Randomness(0, range(COUNT))
    _, figures = system.loss(batch, randomness)
    is_face = (batch["task_ids"] == FACE)[:, None]

    def unlike(strangers):
        others = torch.where(strangers, -batch["id_embeds"] - 0.1, batch["id_embeds"])
        return system.loss({**batch, "id_embeds": others}, randomness)[1]["unlike"]

    assert unlike(~is_face) == figures["unlike"]
    assert unlike(is_face) != figures["unlike"]
    with torch.no_grad():
        system.adapter.image_proj.latents += 0.5
    lost, _ = system._errors(batch)
    is_face = is_face[:, 0]
    held = (lost[~is_face].sum() + instruct_faces.HOLD_OF_FACES * lost[is_face].sum()) / COUNT
    torch.testing.assert_close(system.loss(batch, randomness)[1]["lost"], held)


def test_in_parts_it_is_validated_the_same(base, columns, options):
    system = instruct_faces.build(options, base, columns)
    with torch.no_grad():
        system.adapter.image_proj.latents += 0.1
    batch, randomness = columns.rows(range(COUNT), system.columns), Randomness(0, range(COUNT))
    whole = system.validate(batch, randomness)
    assert set(whole) == {"lost_of_before", "unlike"}
    system.rows_at_once = 3
    parts = system.validate(batch, randomness)
    assert parts == pytest.approx(whole, rel=1e-4)
    rows = (batch["task_ids"] != FACE).nonzero()[:, 0].tolist()
    others = {name: values[rows] for name, values in batch.items()}
    assert set(system.validate(others, Randomness(0, rows))) == {"lost_of_before"}


def test_what_it_needs_is_told(base, columns, options, folder, tmp_path):
    with pytest.raises(ImpromptError, match=r"system\.start_from"):
        instruct_faces.build(replace(options, start_from=""), base, columns)
    prepare("diorama-instruct:5", tmp_path / "data", base, variant="instruct")
    with pytest.raises(ImpromptError, match="id_embeds"):
        instruct_faces.build(options, base, Columns.open(tmp_path / "data"))
    with pytest.raises(ImpromptError, match="likeness"):
        replace(options, likeness=0.5)
