"""Each setting of a training does what it says."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small_system import SmallSystem, write_numbers
from torch import nn

from imprompt.training import log, parallel
from imprompt.training.config import TrainConfig
from imprompt.training.loop import train
from imprompt.training.optim import MovingAverage, create_optimizer, learning_rate_factor
from imprompt.training.order import rows_of_samples
from imprompt.training.parallel import Step, WholeEngine
from imprompt.training.processes import Processes
from imprompt.training.state import whole_checkpoints

CONFIG = TrainConfig(
    steps=30,
    batch_size=5,
    learning_rate=0.05,
    ema_decay=0.9,
    checkpoint_every_steps=7,
    validate_every_steps=10,
    validation_rows=4,
    report_to="none",
)


@pytest.fixture
def columns(tmp_path):
    return write_numbers(tmp_path / "data")


def test_the_average_follows_slowly():
    weight = nn.Parameter(torch.zeros(1))
    average = MovingAverage([weight], 0.9)
    weight.data.fill_(1.0)
    average.update(1000)
    torch.testing.assert_close(average.averages[0], torch.tensor([0.1]))


def test_the_learning_rate_over_the_steps():
    config = TrainConfig(steps=100, warmup_steps=10, schedule="cosine")
    found = [learning_rate_factor(step, config) for step in (0, 50, 100)]
    assert found == pytest.approx([0.1, 0.505, 0.01])
    assert learning_rate_factor(4, replace(config, schedule="constant")) == 0.5


def test_the_optimizers_numbers_are_the_settings():
    config = TrainConfig(steps=1, beta2=0.95, weight_decay=0.3)
    (group,) = create_optimizer([nn.Parameter(torch.zeros(1))], config).param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.3)


@pytest.mark.parametrize(("limit", "length"), [(1.0, 1.0), (0.0, 50.0)])
def test_gradients_are_clipped_to_the_limit(monkeypatch, limit, length):
    monkeypatch.setattr(parallel, "create_optimizer", lambda ps, config: torch.optim.SGD(ps, 1.0))
    system = SmallSystem()
    config = TrainConfig(steps=1, max_gradient_norm=limit)
    engine = WholeEngine(
        Processes("single", 0, 1, torch.device("cpu")),
        Step(system, "float32", torch.device("cpu")),
        config,
    )
    engine.backward(
        system.module.weight.sum() * 0
        + 30 * system.module.weight[0, 0]
        + 40 * system.module.bias[0]
    )
    assert engine.update(1.0) == 50
    moved = torch.cat([p.detach().flatten() for p in system.module.parameters()]).norm()
    torch.testing.assert_close(moved, torch.tensor(length))


def test_the_last_checkpoints_are_kept(columns, tmp_path):
    train(SmallSystem(), columns, replace(CONFIG, keep_checkpoints=2), tmp_path / "run")
    assert [p.name for p in whole_checkpoints(tmp_path / "run/checkpoints")] == [
        "step-00000028",
        "step-00000030",
    ]


def test_the_best_is_known_after_a_resume(columns, tmp_path):
    errors = iter([1.0, 0.1, 0.5])

    def run(config):
        system = SmallSystem()
        system.validate = lambda batch, randomness: {"error": next(errors)}
        train(system, columns, config, tmp_path / "run")

    run(replace(CONFIG, steps=20))
    run(CONFIG)
    assert json.loads((tmp_path / "run/best/best.json").read_text())["step"] == 20


class Normed(SmallSystem):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.linear = self.module
        self.module = nn.Sequential(self.norm, self.linear)

    def loss(self, batch, randomness):
        self.training = self.module.training
        self.seen_modes = getattr(self, "seen_modes", []) + [self.module.training]
        return (self.module(batch["x"]) - batch["y"]).square().mean(), {}


def test_running_statistics_are_neither_validated_away_nor_lost(columns, tmp_path):
    config = replace(CONFIG, ema_decay=0.0, validate_every_steps=3)
    system = Normed()
    straight = load_file(train(system, columns, config, tmp_path / "straight"))
    assert all(system.seen_modes)
    run = tmp_path / "run"
    train(Normed(), columns, config, run)
    (whole_checkpoints(run / "checkpoints")[-1] / "counters.json").unlink()
    resumed = load_file(train(Normed(), columns, config, run))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_another_seed_is_another_order():
    first, other = (rows_of_samples(range(60), 60, seed).tolist() for seed in (0, 1))
    assert first != other


def test_held_out_rows_are_not_trained_on(columns, tmp_path):
    system, seen = SmallSystem(), set()
    loss = system.loss
    system.loss = lambda batch, r: seen.update(batch["x"][:, 0].tolist()) or loss(batch, r)
    train(system, columns, CONFIG, tmp_path / "run")
    x = columns.rows(range(64), ["x"])["x"][:, 0].tolist()
    assert seen == set(x[:60])


def test_what_is_validated_is_what_is_exported(columns, tmp_path):
    system = SmallSystem()
    exported = load_file(train(system, columns, CONFIG, tmp_path / "run"))
    last = [
        n["validation_error"]
        for n in log.read(tmp_path / "run/log.jsonl")
        if "validation_error" in n
    ][-1]
    system.module.load_state_dict(exported)
    assert last == pytest.approx(
        system.validate(columns.rows(range(60, 64), ("x", "y")), None)["error"]
    )


def test_logged_losses_are_means(columns, tmp_path):
    system = SmallSystem()
    system.loss = lambda batch, r: (
        system.module.weight.sum() * 0 + system.module.bias.sum() * 0 + 2.0,
        {},
    )
    train(system, columns, replace(CONFIG, log_every_steps=5), tmp_path / "run")
    assert [n["loss"] for n in log.read(tmp_path / "run/log.jsonl") if "loss" in n] == [2.0] * 6


def test_what_trains_stays_in_full_precision(tmp_path):
    from tiny_base import write_tiny_base

    from imprompt.bases import load_base
    from imprompt.data.dataset import Columns, ColumnsWriter
    from imprompt.training.run import prepare_run

    base = load_base(write_tiny_base(tmp_path / "base"))
    writer = ColumnsWriter(tmp_path)
    writer.write(
        0,
        {
            "latents": torch.zeros(2, *base.latent_shape()),
            "phrasing_ids": base.tokenize(["a", "b"])[:, None],
        },
    )
    writer.finish(2, {"encoders_fingerprint": base.encoders_fingerprint()})
    settings = [
        "train.steps=1",
        "train.validation_rows=0",
        "train.precision=bfloat16",
        "train.frozen_precision=bfloat16",
        "system.start=base",
    ]
    system, _, _ = prepare_run("text-to-image", base, Columns.open(tmp_path), None, settings)
    assert {p.dtype for p in system.module.parameters()} == {torch.float32}
