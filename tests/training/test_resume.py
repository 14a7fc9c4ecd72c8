"""Stopping and going on equals never having stopped."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_system import SmallSystem, write_numbers

from imprompt.core.errors import ImpromptError
from imprompt.training import parallel, state
from imprompt.training.config import TrainConfig
from imprompt.training.loop import Interrupted, train
from imprompt.training.order import rows_of_samples
from imprompt.training.state import whole_checkpoints

CONFIG = TrainConfig(
    steps=30,
    batch_size=5,
    learning_rate=0.05,
    warmup_steps=3,
    schedule="cosine",
    ema_decay=0.9,
    checkpoint_every_steps=7,
    validate_every_steps=10,
    validation_rows=4,
)


@pytest.fixture
def columns(tmp_path):
    return write_numbers(tmp_path / "data")


def test_it_learns(columns, tmp_path):
    system = SmallSystem()
    config = TrainConfig(steps=400, batch_size=16, learning_rate=0.05, validation_rows=4)
    train(system, columns, config, tmp_path / "run")
    torch.testing.assert_close(
        system.module.weight.detach(), torch.tensor([[1.0, -2.0, 0.5]]), atol=0.1, rtol=0
    )


@pytest.mark.parametrize("stop_after", [1, 7, 13, 29])
def test_interrupted_and_resumed_is_bit_for_bit_the_same(columns, tmp_path, stop_after):
    straight = load_file(train(SmallSystem(), columns, CONFIG, tmp_path / "straight"))
    system = SmallSystem()
    original, calls = system.loss, 0

    def interrupting(batch, randomness):
        nonlocal calls
        calls += 1
        if calls == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, randomness)

    system.loss = interrupting
    with pytest.raises(Interrupted, match=f"step {stop_after}"):
        train(system, columns, CONFIG, tmp_path / "stopped")
    resumed = load_file(train(SmallSystem(), columns, CONFIG, tmp_path / "stopped"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    logs = [(tmp_path / run / "log.jsonl").read_text() for run in ("straight", "stopped")]
    assert logs[0] == logs[1]  # also the means over steps before and after the stop


def test_the_moving_average_is_what_is_exported(columns, tmp_path):
    system = SmallSystem()
    exported = load_file(train(system, columns, CONFIG, tmp_path / "run"))
    assert not torch.equal(exported["weight"], system.module.weight)


def test_killed_while_writing_a_checkpoint_the_one_before_counts(columns, tmp_path, capsys):
    straight = load_file(train(SmallSystem(), columns, CONFIG, tmp_path / "straight"))
    run = tmp_path / "run"
    train(SmallSystem(), columns, CONFIG, run)
    newest = whole_checkpoints(run / "checkpoints")[-1]
    newest.rename(newest.with_name(newest.name + ".writing"))
    assert whole_checkpoints(run / "checkpoints")
    again = load_file(train(SmallSystem(), columns, CONFIG, run))
    assert all(torch.equal(straight[name], again[name]) for name in straight)
    assert "ignoring" in capsys.readouterr().err


def test_a_finished_run_is_not_repeated(columns, tmp_path):
    train(SmallSystem(), columns, CONFIG, tmp_path / "run")
    system = SmallSystem()
    train(system, columns, CONFIG, tmp_path / "run")
    assert system.seen == []


def test_another_run_in_the_same_folder_is_refused_and_says_why(columns, tmp_path):
    train(SmallSystem(), columns, CONFIG, tmp_path / "run")
    other = TrainConfig(**{**CONFIG.__dict__, "learning_rate": 0.01})
    with pytest.raises(ImpromptError, match="learning_rate was 0.05, now 0.01"):
        train(SmallSystem(), columns, other, tmp_path / "run")


def test_a_run_at_a_constant_rate_can_be_made_longer(columns, tmp_path):
    longer = replace(CONFIG, schedule="constant")
    straight = load_file(train(SmallSystem(), columns, longer, tmp_path / "straight"))
    shorter = replace(longer, steps=21, checkpoint_every_steps=4, validate_every_steps=3)
    train(SmallSystem(), columns, shorter, tmp_path / "run")
    resumed = load_file(train(SmallSystem(), columns, longer, tmp_path / "run"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    with pytest.raises(ImpromptError, match="at step 30 already"):
        train(SmallSystem(), columns, shorter, tmp_path / "run")


def test_a_schedule_that_ends_with_the_run_cannot(columns, tmp_path):
    train(SmallSystem(), columns, CONFIG, tmp_path / "run")
    with pytest.raises(ImpromptError, match="steps was 30, now 40"):
        train(SmallSystem(), columns, replace(CONFIG, steps=40), tmp_path / "run")


def test_a_folder_with_something_else_is_refused(columns, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ImpromptError, match="not empty"):
        train(SmallSystem(), columns, CONFIG, tmp_path / "run")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_a_full_disk_leaves_the_previous_checkpoint(columns, tmp_path, monkeypatch):
    real, calls = state.save_file, 0

    def full(tensors, path):
        nonlocal calls
        calls += 1
        if calls == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(ImpromptError, match="disk is full"):
        train(SmallSystem(), columns, CONFIG, tmp_path / "run")
    assert [p.name for p in whole_checkpoints(tmp_path / "run/checkpoints")][-1] == "step-00000014"
    monkeypatch.undo()
    train(SmallSystem(), columns, CONFIG, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(columns, tmp_path):
    with pytest.raises(ImpromptError, match="samples 50 to 54"):
        train(SmallSystem(fail_at_sample=52), columns, CONFIG, tmp_path / "run")


def test_a_parameter_without_gradient_is_an_error(columns, tmp_path):
    with pytest.raises(ImpromptError, match="unused"):
        train(SmallSystem(unused=True), columns, CONFIG, tmp_path / "run")


def test_every_epoch_sees_every_row_once(columns, tmp_path):
    rows = rows_of_samples(range(120), 60, seed=3)
    assert sorted(rows[:60]) == list(range(60)) == sorted(rows[60:])
    assert list(rows[:60]) != list(rows[60:])


class EightBits(torch.optim.Optimizer):
    """Its state is laid out as that of bitsandbytes' AdamW8bit: all parameters share one table."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.0})
        self.tables = {"qmap1": torch.linspace(-1, 1, 256), "qmap2": torch.linspace(0, 1, 256)}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    moment = torch.zeros_like(parameter, dtype=torch.uint8)
                    state |= {"step": 0, "state1": moment, "absmax1": torch.zeros(1), **self.tables}
                state["step"] += 1
                state["absmax1"] = 0.9 * state["absmax1"] + parameter.grad.abs().max()
                index = (127 + 100 * parameter.grad / state["absmax1"]).to(torch.uint8)
                state["state1"] = index
                parameter -= group["lr"] * state["qmap1"][index.long()]


def test_moments_in_8_bits_are_saved_and_put_back(columns, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "create_optimizer", lambda ps, config: EightBits(ps))
    straight = load_file(train(SmallSystem(), columns, CONFIG, tmp_path / "straight"))
    train(SmallSystem(), columns, CONFIG, tmp_path / "run")
    newest = whole_checkpoints(tmp_path / "run/checkpoints")[-1]
    assert {"qmap1.weight", "qmap1.bias"} <= load_file(newest / "state.safetensors").keys()
    (newest / "counters.json").unlink()
    resumed = load_file(train(SmallSystem(), columns, CONFIG, tmp_path / "run"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_whatever_fails_while_writing_is_told_in_a_line(columns, tmp_path, monkeypatch):
    def failing(tensors, path):
        raise RuntimeError("shared memory")

    monkeypatch.setattr(state, "save_file", failing)
    with pytest.raises(ImpromptError, match="could not be written to .*: shared memory"):
        train(SmallSystem(), columns, CONFIG, tmp_path / "run")


SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
import time
from pathlib import Path
from small_system import SmallSystem
from imprompt.data.dataset import Columns
from imprompt.training.config import TrainConfig
from imprompt.training.loop import train
class Slow(SmallSystem):
    def loss(self, batch, randomness):
        time.sleep(0.01)
        return super().loss(batch, randomness)
config = TrainConfig(**{config!r})
train(Slow(), Columns.open({data!r}), config, Path({run!r}))
"""


def test_kill_9_loses_at_most_the_steps_since_the_last_checkpoint(columns, tmp_path):
    straight = load_file(train(SmallSystem(), columns, CONFIG, tmp_path / "straight"))
    tests = str(Path(__file__).parent.parent)
    script = SCRIPT.format(
        tests=tests, config=CONFIG.__dict__, data=str(columns.path), run=str(tmp_path / "run")
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not whole_checkpoints(tmp_path / "run/checkpoints") and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert whole_checkpoints(tmp_path / "run/checkpoints")
    again = load_file(train(SmallSystem(), columns, CONFIG, tmp_path / "run"))
    assert all(torch.equal(straight[name], again[name]) for name in straight)
