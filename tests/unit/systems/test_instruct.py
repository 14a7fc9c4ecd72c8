"""IP-Adapter-Instruct as a system, and its beginning in words."""

import os
from dataclasses import replace

import pytest
import torch
from tiny_base import write_tiny_base

from imprompt.adapters import create_adapter
from imprompt.bases import load_base
from imprompt.checkpoints import load_adapter, save_adapter
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns
from imprompt.data.instructions import TASKS
from imprompt.data.prepare import prepare
from imprompt.encoders.instruction import instruction_states
from imprompt.systems import instruct, instruct_words
from imprompt.systems.instruct import InstructSystem, drops
from imprompt.systems.instruct_options import DROPS, InstructOptions
from imprompt.systems.instruct_words import InstructWordsOptions
from imprompt.training.run import run_training

SMALL = InstructOptions(num_tokens=3, resampler_dim=64, depth=1)
WORDS = InstructWordsOptions(num_tokens=3, resampler_dim=64, depth=1)
KEEP_ALL = replace(SMALL, **dict.fromkeys(DROPS, 0.0))
SETTINGS = ["system.num_tokens=3", "system.resampler_dim=64", "system.depth=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instruct")
    write_tiny_base(folder / "base", image_encoder=True)
    base = load_base(folder / "base")
    prepare("diorama-instruct:20", folder / "data", base, variant="instruct-words")
    return folder


@pytest.fixture
def base(folder):
    return load_base(folder / "base")


@pytest.fixture
def columns(folder):
    return Columns.open(folder / "data")


def prepared_with_faces(base, tmp_path):
    """Two lessons of each task."""
    prepare("diorama-instruct:10", tmp_path / "data", base, variant="instruct-faces")
    return Columns.open(tmp_path / "data")


def test_drops_come_at_their_rates():
    image, text, instruction = drops(Randomness(0, range(40_000)), InstructOptions())
    for share in (
        image & ~text & ~instruction,
        text & ~image & ~instruction,
        instruction & ~image & ~text,
        text & instruction & ~image,
        image & text & instruction,
    ):
        assert share.float().mean().item() == pytest.approx(0.05, abs=0.004)


def test_exactly_the_adapter_receives_gradients(base, columns):
    system = instruct.build(KEEP_ALL, base, columns)
    loss, _ = system.loss(columns.rows(range(6), system.columns), Randomness(0, range(6)))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in system.module.parameters())
    assert all(p.grad is None for part in base.parts().values() for p in part.parameters())


@pytest.mark.parametrize("embedding", ["tokens", "pooled"])
@pytest.mark.parametrize("column", ["condition_states", "instruction_ids", "text_ids"])
def test_tokens_depend_on_each_condition(base, columns, column, embedding, monkeypatch):
    options = replace(KEEP_ALL, instruction_embedding=embedding)
    system = instruct.build(options, base, columns)
    read = []
    condition = system._handle.condition
    monkeypatch.setattr(
        system._handle, "condition", lambda tokens: read.append(tokens) or condition(tokens)
    )
    batch = columns.rows(range(5), system.columns)
    for given in (batch, {**batch, column: batch[column].roll(1, 0)}, batch):
        system.loss(given, Randomness(0, range(5)))
    assert torch.equal(read[0], read[2])
    assert not torch.equal(read[0], read[1])


def test_a_lora_is_learnt_beside_and_kept_by_what_grows(base, columns, tmp_path):
    system = instruct.build(replace(KEEP_ALL, lora_rank=2), base, columns)
    up = "ip_adapter.0.to_q_lora.up.weight"
    assert not system.module.state_dict()[up].any()
    optimizer = torch.optim.SGD(system.module.parameters(), lr=0.1)
    loss, _ = system.loss(columns.rows(range(6), system.columns), Randomness(0, range(6)))
    loss.backward()
    optimizer.step()
    learnt = system.module.state_dict()[up]
    assert learnt.any()
    system.export(tmp_path / "a.safetensors")
    again = replace(KEEP_ALL, start_from=str(tmp_path / "a.safetensors"))
    for options in (again, replace(again, positions=True), replace(again, lora_rank=2)):
        adapter = instruct.build(options, base, columns).module
        assert adapter.lora_rank == 2 and torch.equal(adapter.state_dict()[up], learnt)
    words = replace(WORDS, start_from=again.start_from, added_layers=1)
    assert torch.equal(instruct_words.build(words, base, columns).adapter.state_dict()[up], learnt)


def test_likeness_is_of_lessons_of_faces_that_are_told_and_shown(folder, base, columns, tmp_path):
    options = replace(KEEP_ALL, likeness=0.5)
    with pytest.raises(ImpromptError, match="id_embeds"):
        instruct.build(options, base, columns)
    columns = prepared_with_faces(base, tmp_path)
    system = instruct.build(options, base, columns)
    assert {"task_ids", "id_embeds"} <= set(system.columns)
    batch = columns.rows(range(10), system.columns)
    randomness = Randomness(0, range(10))
    loss, figures = system.loss(batch, randomness)
    of_noise, of_likeness = figures["loss_of_noise"], figures["loss_of_likeness"]
    assert of_likeness > 0
    assert loss.item() == pytest.approx((of_noise + 0.5 * of_likeness).item())
    is_face = batch["task_ids"] == TASKS.index("face")
    assert is_face.sum() == 2

    def likeness(given, **dropped):
        told = instruct.build(replace(options, **dropped), base, columns)
        return told.loss(given, randomness)[1]["loss_of_likeness"]

    def strangers(where):
        others = torch.where(where[:, None], -batch["id_embeds"], batch["id_embeds"])
        return {**batch, "id_embeds": others}

    assert likeness(strangers(~is_face)) == of_likeness
    assert likeness(strangers(is_face)) != of_likeness
    for name in ("drop_image", "drop_instruction", "drop_all"):
        assert likeness(batch, **{name: 1.0}) == 0
    assert likeness(batch, drop_text=1.0) > 0


def test_likeness_can_be_of_what_is_drawn_from_noise(base, tmp_path):
    with pytest.raises(ImpromptError, match="drawn_steps is about likeness"):
        InstructOptions(drawn_steps=4)
    columns = prepared_with_faces(base, tmp_path)
    options = replace(KEEP_ALL, likeness=0.5, drawn_steps=4)
    system = instruct.build(options, base, columns)
    batch = columns.rows(range(10), system.columns)
    is_face = batch["task_ids"] == TASKS.index("face")

    def figures(given, rows=range(10), **changed):
        of = instruct.build(replace(options, **changed), base, columns)
        some = {name: values[list(rows)] for name, values in given.items()}
        return of.loss(some, Randomness(0, rows))[1]

    drawn = figures(batch)["loss_of_likeness"]
    assert drawn > 0 and drawn != figures(batch, drawn_steps=0)["loss_of_likeness"]
    # The target is not looked at; only who shall be seen, and what the adapter is told.
    elsewhere = {**batch, "latent_mean": batch["latent_mean"].roll(1, 0)}
    assert figures(elsewhere)["loss_of_likeness"] == drawn
    for name in ("condition_states", "instruction_ids", "text_ids", "id_embeds"):
        other = torch.where(
            is_face.reshape(-1, *[1] * (batch[name].ndim - 1)), batch[name].flip(0), batch[name]
        )
        assert figures({**batch, name: other})["loss_of_likeness"] != drawn
    parts = [figures(batch, range(5)), figures(batch, range(5, 10))]
    assert sum(part["loss_of_likeness"] for part in parts) / 2 == pytest.approx(drawn.item())
    for name in ("drop_image", "drop_instruction", "drop_all"):
        assert figures(batch, **{name: 1.0})["loss_of_likeness"] == 0


def test_drawing_is_guided_away_from_nothing_which_does_not_learn(base, tmp_path, monkeypatch):
    columns = prepared_with_faces(base, tmp_path)
    system = instruct.build(replace(KEEP_ALL, likeness=1.0, drawn_steps=3), base, columns)
    batch = columns.rows(range(10), system.columns)
    rows = (batch["task_ids"] == TASKS.index("face")).nonzero()[:, 0].tolist()
    learning = []
    denoise = base.denoise

    def watched(noisy, timesteps, text_states, condition):
        learning.append((torch.is_grad_enabled(), text_states.sequence))
        return denoise(noisy, timesteps, text_states, condition)

    monkeypatch.setattr(base, "denoise", watched)
    system._drawn(batch, Randomness(0, range(10)), rows)
    empty = base.encode_text([""]).sequence
    for number, (learns, read) in enumerate(learning):
        assert learns == (number == len(learning) - 1)
        assert torch.equal(read, empty.expand_as(read)) == (number % 2 == 0)


def test_lessons_of_no_face_are_held_to_what_another_adapter_predicts(base, tmp_path):
    columns = prepared_with_faces(base, tmp_path)
    with pytest.raises(ImpromptError, match="hold is about an adapter"):
        instruct.build(replace(KEEP_ALL, hold=1.0), base, columns)
    for seed in (0, 1):
        adapter = create_adapter(
            base.unet,
            "instruct",
            feature_dim=24,
            num_tokens=3,
            resampler_dim=64,
            depth=1,
            seed=seed,
        )
        save_adapter(adapter, tmp_path / f"{seed}.safetensors", {})
    here, there = (str(tmp_path / f"{seed}.safetensors") for seed in (0, 1))
    options = replace(KEEP_ALL, start_from=here, hold=2.0)
    batch = columns.rows(range(10), instruct.build(options, base, columns).columns)

    def loss(given, rows=range(10), **changed):
        of = instruct.build(replace(options, **changed), base, columns)
        some = {name: values[list(rows)] for name, values in given.items()}
        return of, *of.loss(some, Randomness(0, rows))

    assert loss(batch)[2]["loss_of_hold"] < 1e-9
    system, held, figures = loss(batch, hold_to=there)
    assert figures["loss_of_hold"] > 0
    assert held.item() == pytest.approx(
        (loss(batch, hold=0.0)[1] + 2 * figures["loss_of_hold"]).item()
    )
    held.backward()
    assert all(weight.grad is not None for weight in system.module.parameters())
    # What is told of a face may change without being held; of anything else it may not.
    is_face = batch["task_ids"] == TASKS.index("face")
    for where, same in ((is_face, True), (~is_face, False)):
        told = torch.where(where[:, None], batch["text_ids"].flip(0), batch["text_ids"])
        moved = loss({**batch, "text_ids": told}, hold_to=there)[2]["loss_of_hold"]
        assert (moved.item() == pytest.approx(figures["loss_of_hold"].item(), rel=1e-5)) == same
    parts = [
        loss(batch, rows, hold_to=there)[2]["loss_of_hold"] for rows in (range(5), range(5, 10))
    ]
    assert sum(parts) / 2 == pytest.approx(figures["loss_of_hold"].item())


def test_a_face_network_looks_at_lessons_of_faces(base, tmp_path):
    columns = prepared_with_faces(base, tmp_path)
    system = instruct.build(replace(KEEP_ALL, perceptual=0.5), base, columns)
    batch = columns.rows(range(10), system.columns)
    samples = range(200, 210)  # whose timesteps leave something of a face to be seen

    def figures(given, **changed):
        of = instruct.build(replace(KEEP_ALL, perceptual=0.5, **changed), base, columns)
        loss, told = of.loss(given, Randomness(0, samples))
        assert loss.item() == pytest.approx(
            (told["loss_of_noise"] + 0.5 * told["loss_of_portraits"]).item()
        )
        return told["loss_of_portraits"]

    unlike = figures(batch)
    assert unlike > 0
    is_face = batch["task_ids"] == TASKS.index("face")
    for where, same in ((is_face, False), (~is_face, True)):
        name = "latent_mean"
        other = torch.where(where[:, None, None, None], batch[name].flip(0), batch[name])
        assert (figures({**batch, name: other}).item() == pytest.approx(unlike.item())) == same
    for name in ("drop_image", "drop_instruction", "drop_all"):
        assert figures(batch, **{name: 1.0}) == 0


def test_dropped_conditions_are_what_generation_brings_for_none(base, columns):
    dropped = replace(KEEP_ALL, drop_all=1.0)
    system = instruct.build(dropped, base, columns)
    batch = columns.rows(range(3), system.columns)
    loss, _ = system.loss(batch, Randomness(0, range(3)))
    empty = base.tokenize([""]).expand(3, -1)
    states = base.image_encoder.zero_hidden_states().expand(3, -1, -1)
    replaced = {**batch, "condition_states": states, "text_ids": empty, "instruction_ids": empty}
    expected, _ = instruct.build(KEEP_ALL, base, columns).loss(replaced, Randomness(0, range(3)))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_begun_as_plus_it_is_that_plus_adapter(base, columns, tmp_path):
    plus = create_adapter(
        base.unet, "plus", feature_dim=24, num_tokens=3, resampler_dim=64, depth=2, seed=3
    )
    save_adapter(plus, tmp_path / "plus.safetensors")
    system = instruct.build(
        replace(KEEP_ALL, start_from=str(tmp_path / "plus.safetensors")), base, columns
    )
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(2, 5, 24, generator=draw)
    text, prompt = torch.randn(2, 2, 12, 16, generator=draw)
    tokens = system.module.tokens(states, text, prompt)
    # Near it, not it: the further attentions begin near zero, so that gradients reach them.
    torch.testing.assert_close(tokens, plus.tokens(states), atol=2e-2, rtol=2e-2)
    assert not torch.equal(tokens, plus.tokens(states))
    for index, site in plus.site_weights.items():
        own = system.module.site_weights[index]
        assert torch.equal(own.to_k_ip.weight, site.to_k_ip.weight)


def test_pooled_is_the_state_at_the_end(base):
    states = instruction_states(base, ["use the style", "a"])
    pooled = instruction_states(base, ["use the style", "a"], "pooled")
    ends = (base.tokenize(["use the style", "a"]) == base.tokenizer.eos_token_id).int().argmax(1)
    assert pooled.shape == (2, 1, states.shape[2])
    for row, end in enumerate(ends.tolist()):
        assert torch.equal(pooled[row, 0], states[row, end])
    with pytest.raises(ImpromptError, match="tokens or pooled"):
        instruction_states(base, ["a"], "mean")


@pytest.mark.parametrize("embedding", ["tokens", "pooled"])
def test_instructions_are_encoded_where_the_base_is(base, embedding):
    ids = base.tokenize(["use the style", "a"])
    base.to("meta")  # a device that takes no tensor of another one
    assert instruction_states(base, ids, embedding).device.type == "meta"


def test_words_teach_the_resampler_alone(base, columns):
    system = instruct_words.build(WORDS, base, columns)
    sites = {i: w.to_k_ip.weight.clone() for i, w in system.adapter.site_weights.items()}
    batch = columns.rows(range(10), system.columns)
    optimizer = torch.optim.Adam(system.module.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss, _ = system.loss(batch, Randomness(0, range(10)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(
        torch.equal(w.to_k_ip.weight, sites[i]) for i, w in system.adapter.site_weights.items()
    )


def learn(system, batch, randomness):
    """Forty steps on one batch."""
    optimizer = torch.optim.Adam(system.module.parameters(), lr=3e-3)
    for _ in range(40):
        loss, _ = system.loss(batch, randomness)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_added_tokens_learn_words_while_the_others_say_what_they_said(base, columns, tmp_path):
    old = create_adapter(base.unet, "instruct", feature_dim=24, num_tokens=3, resampler_dim=64)
    save_adapter(old, tmp_path / "old.safetensors", {"base_fingerprint": base.fingerprint()})
    options = replace(WORDS, start_from=str(tmp_path / "old.safetensors"), added_tokens=4)
    system = instruct_words.build(options, base, columns)
    grown = system.adapter.state_dict()
    latents = grown.pop("image_proj.latents")
    assert torch.equal(latents[:, :3], old.state_dict()["image_proj.latents"])
    assert latents.shape[1] == 7 and latents[:, 3:].std() > 0
    assert all(torch.equal(grown[name], old.state_dict()[name]) for name in grown)
    batch, randomness = columns.rows(range(10), system.columns), Randomness(0, range(10))
    before = system.validate(batch, randomness)
    learn(system, batch, randomness)
    after = system.validate(batch, randomness)
    assert after["unsaid"] < 0.7 * before["unsaid"]
    assert after["lost_of_before"] < before["lost_of_before"]
    system.export(tmp_path / "grown.safetensors")
    assert load_adapter(tmp_path / "grown.safetensors").num_tokens == 7


def test_added_layers_learn_some_tasks_while_the_others_are_held(base, columns, tmp_path):
    torch.manual_seed(0)
    old = create_adapter(base.unet, "instruct", feature_dim=24, num_tokens=3, resampler_dim=64)
    save_adapter(old, tmp_path / "old.safetensors", {"base_fingerprint": base.fingerprint()})
    options = replace(
        WORDS,
        start_from=str(tmp_path / "old.safetensors"),
        added_layers=1,
        learn=("composition",),
    )
    system = instruct_words.build(options, base, columns)
    batch, randomness = columns.rows(range(20), system.columns), Randomness(0, range(20))
    before = system.validate(batch, randomness)
    assert before["lost_of_before"] == pytest.approx(0, abs=1e-6)
    rows = [i for i, task in enumerate(batch["task_ids"].tolist()) if task == 3]
    layouts = {name: values[rows] for name, values in batch.items()}
    alone = system.validate(layouts, Randomness(0, rows))
    assert alone["unsaid"] == pytest.approx(before["unsaid"], rel=1e-4)  # of its own rows alone
    learn(system, batch, randomness)
    after = system.validate(batch, randomness)
    assert after["unsaid"] < 0.7 * before["unsaid"]
    assert after["lost_of_before"] < 0.3 * after["unsaid"] + 0.1
    system.export(tmp_path / "grown.safetensors")
    again = replace(options, start_from=str(tmp_path / "grown.safetensors"), added_layers=0)
    held = instruct_words.build(
        replace(again, hold_to=str(tmp_path / "old.safetensors")), base, columns
    )
    assert instruct_words.build(again, base, columns).validate(batch, randomness)[
        "lost_of_before"
    ] == pytest.approx(0, abs=1e-6)
    figures = held.validate(batch, randomness)
    assert figures["lost_of_before"] == pytest.approx(after["lost_of_before"], rel=1e-3)
    depth = len(load_adapter(tmp_path / "grown.safetensors").image_proj.get_submodule("layers"))
    assert depth == len(old.image_proj.get_submodule("layers")) + 1


def learning_layouts(base, columns, folder, **more):
    """A system that learns the words of compositions, and holds tokens that are no longer what they were."""
    torch.manual_seed(0)
    old = create_adapter(base.unet, "instruct", feature_dim=24, num_tokens=3, resampler_dim=64)
    save_adapter(old, folder / "old.safetensors", {"base_fingerprint": base.fingerprint()})
    options = replace(WORDS, start_from=str(folder / "old.safetensors"), **more)
    system = instruct_words.build(options, base, columns)
    with torch.no_grad():
        system.adapter.image_proj.latents += 0.1
    return system


def test_each_row_counts_once_as_learnt_or_held(base, columns, tmp_path):
    system = learning_layouts(
        base, columns, tmp_path, learn=("composition",), drop_text=0.0, layout_weight=4.0
    )
    batch, no_text = columns.rows(range(20), system.columns), torch.zeros(20, dtype=torch.bool)
    unsaid, lost = system.unsaid(batch, no_text), system.lost(batch, no_text)
    assert (len(unsaid), len(lost)) == (4, 16) and lost.min() > 0
    loss, _ = system.loss(batch, Randomness(0, range(20)))
    torch.testing.assert_close(loss, (4 * unsaid.sum() + lost.sum()) / 20)
    figures = system.validate(batch, Randomness(0, range(20)))
    assert figures["unsaid"] == pytest.approx(unsaid.mean().item())
    assert figures["lost_of_before"] == pytest.approx(lost.mean().item())


def test_validated_in_parts_of_which_some_learn_nothing_it_is_the_same(base, columns, tmp_path):
    system = learning_layouts(base, columns, tmp_path, learn=("composition",))
    batch, randomness = columns.rows(range(20), system.columns), Randomness(0, range(20))
    whole = system.validate(batch, randomness)
    for rows in (1, 3):
        system.rows_at_once = rows
        assert system.validate(batch, randomness) == pytest.approx(whole, rel=1e-4)
    rows = [i for i, task in enumerate(batch["task_ids"].tolist()) if task == 3]
    layouts = {name: values[rows] for name, values in batch.items()}
    assert "lost_of_before" not in system.validate(layouts, Randomness(0, rows))
    rows = [i for i in range(20) if i not in rows]
    others = {name: values[rows] for name, values in batch.items()}
    assert list(system.validate(others, Randomness(0, rows))) == ["lost_of_before"]


def test_added_tokens_are_held_and_learn_in_every_row(base, columns, tmp_path):
    system = learning_layouts(base, columns, tmp_path, added_tokens=4)
    batch, no_text = columns.rows(range(20), system.columns), torch.zeros(20, dtype=torch.bool)
    assert len(system.unsaid(batch, no_text)) == len(system.lost(batch, no_text)) == 20


def test_a_compositions_words_may_count_more(base, columns):
    rows = [i for i in range(20) if columns.rows([i], ["task_ids"])["task_ids"] == 3]
    one, four = (
        instruct_words.build(replace(WORDS, layout_weight=w), base, columns) for w in (1.0, 4.0)
    )
    four.module.load_state_dict(one.module.state_dict())
    losses = []
    for system in (one, four):
        batch = columns.rows(rows, system.columns)
        losses.append(system.loss(batch, Randomness(0, rows))[0])
    torch.testing.assert_close(losses[1], 4 * losses[0])


def test_tokens_are_added_to_an_adapter_only():
    for more in ({"added_tokens": 4}, {"added_layers": 1}, {"learn": ("face",)}):
        with pytest.raises(ImpromptError, match="none is named"):
            InstructWordsOptions(**more)
    with pytest.raises(ImpromptError, match="no task 'mood' to learn"):
        InstructWordsOptions(start_from="a.safetensors", learn=("mood",))
    with pytest.raises(ImpromptError, match="none is there"):
        InstructWordsOptions(start_from="a.safetensors", hold_to="b.safetensors")
    with pytest.raises(ImpromptError, match="choose one"):
        InstructWordsOptions(start_from="a.safetensors", added_tokens=4, learn=("face",))


def test_from_words_to_images_by_the_products_own_command(folder, tmp_path):
    train = ["train.steps=3", "train.batch_size=4", "train.validation_rows=5"]

    def run(system, name, more):
        return run_training(
            system,
            data=folder / "data",
            base=str(folder / "base"),
            output=tmp_path / name,
            settings=[*SETTINGS, *train, *more],
        )

    words = run("instruct-words", "words", [])
    begun = load_adapter(words)
    assert begun.variant == "instruct" and begun.metadata["instruction_embedding"] == "tokens"
    joint = run("instruct", "joint", [f'system.start_from="{words}"', "train.learning_rate=0.01"])
    trained = load_adapter(joint)
    assert trained.metadata["base_fingerprint"] == begun.metadata["base_fingerprint"]
    assert not torch.equal(
        trained.state_dict()["ip_adapter.1.to_k_ip.weight"],
        begun.state_dict()["ip_adapter.1.to_k_ip.weight"],
    )
    log = (tmp_path / "joint" / "log.jsonl").read_text()
    assert "validation_loss_with_another_instruction" in log


def test_stopped_and_resumed_it_is_the_same(folder, tmp_path, monkeypatch):
    import signal

    from imprompt.training.loop import Interrupted

    def run(output):
        return run_training(
            "instruct",
            data=folder / "data",
            base=str(folder / "base"),
            output=output,
            settings=[*SETTINGS, "train.steps=6", "train.batch_size=4", "train.validation_rows=5"],
        )

    straight = load_adapter(run(tmp_path / "straight")).state_dict()
    original, calls = InstructSystem.loss, 0

    def interrupting(self, batch, randomness):
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, randomness)

    monkeypatch.setattr(InstructSystem, "loss", interrupting)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped")
    resumed = load_adapter(run(tmp_path / "stopped")).state_dict()
    assert all(torch.equal(resumed[name], values) for name, values in straight.items())


def test_mistakes_are_told(base, columns, folder, tmp_path):
    full = create_adapter(base.unet, "base", feature_dim=20)
    save_adapter(full, tmp_path / "base.safetensors")
    with pytest.raises(ImpromptError, match="is a base adapter"):
        instruct.build(
            InstructOptions(start_from=str(tmp_path / "base.safetensors")), base, columns
        )
    with pytest.raises(ImpromptError, match="choose tokens or pooled"):
        instruct.build(InstructOptions(instruction_embedding="mean"), base, columns)
    base.image_encoder = None
    with pytest.raises(ImpromptError, match="no image encoder"):
        instruct.instruct_adapter(InstructOptions(), base)


def test_an_adapter_that_gets_positions_keeps_all_else_and_learns_them(base, columns, tmp_path):
    before = instruct.build(SMALL, base, columns)
    before.export(tmp_path / "adapter.safetensors")
    before._handle.remove()
    options = replace(KEEP_ALL, positions=True, start_from=str(tmp_path / "adapter.safetensors"))
    system = instruct.build(options, base, columns)
    weights = system.module.state_dict()
    torch.testing.assert_close(
        {key: weights[key] for key in before.module.state_dict()}, dict(before.module.state_dict())
    )
    batch = columns.rows(range(4), system.columns)
    loss, _ = system.loss(batch, Randomness(0, range(4)))
    loss.backward()
    positions = system.module.image_proj.pos_emb.weight
    assert positions.shape == batch["condition_states"].shape[1:]
    assert positions.grad is not None and positions.grad.any()

    system.export(tmp_path / "placed.safetensors")
    system._handle.remove()
    start = replace(SMALL, positions=True, start_from=str(tmp_path / "placed.safetensors"))
    again = instruct.instruct_adapter(start, base)
    torch.testing.assert_close(again.image_proj.pos_emb.weight, positions)
