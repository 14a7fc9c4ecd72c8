"""Where one process trains: what it is told, or a GPU; of several each has its own."""

import pytest
import torch
from small_system import SmallSystem, write_numbers
from tiny_base import write_tiny_base

from imprompt.bases import load_base
from imprompt.cli.main import main
from imprompt.core.errors import ImpromptError
from imprompt.training import processes as processes_module
from imprompt.training import run as run_module
from imprompt.training.config import TrainConfig
from imprompt.training.loop import train
from imprompt.training.processes import join_processes
from imprompt.training.run import run_training


@pytest.mark.parametrize(
    ("cuda", "mps", "wanted"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_a_gpu_is_taken_where_there_is_one(monkeypatch, cuda, mps, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert join_processes().device == torch.device(wanted)
    assert join_processes("single", 1, "cpu").device == torch.device("cpu")


def test_a_device_that_is_not_there_is_told():
    for device in ("cuda:63", "abacus"):
        with pytest.raises(ImpromptError, match=f"{device}.*here is: cpu"):
            join_processes(device=device)


@pytest.mark.parametrize("engine", ["auto", "ddp", "zero2", "fsdp2"])
def test_a_device_for_several_processes_is_refused(monkeypatch, engine):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ImpromptError, match="'cpu' is for one process.*leave --device out"):
        join_processes(engine, device="cpu")


def test_the_command_line_says_it_to_the_run(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(run_module, "run_training", lambda *_, **named: told.append(named))
    command = ["train", "image-prompt", "--data", str(tmp_path), "--output", str(tmp_path / "run")]
    assert main(command) == 0 and main([*command, "--device", "cuda:1"]) == 0
    assert [named["device"] for named in told] == [None, "cuda:1"]


def test_the_base_goes_where_the_run_is_told_to_compute(monkeypatch, tmp_path):
    base = load_base(write_tiny_base(tmp_path / "base"))
    moves = []
    monkeypatch.setattr(base, "to", lambda *to: moves.append(to))
    for device in ("cpu", "meta"):
        with pytest.raises(ImpromptError, match="no such folder"):
            run_training(
                "image-prompt", data=tmp_path / "no", base=base, output=tmp_path, device=device
            )
    assert moves == [(torch.device("meta"),)]


def test_a_system_that_is_trained_by_hand_stays_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(processes_module, "default_device", lambda: torch.device("meta"))
    system = SmallSystem()
    config = TrainConfig(steps=2, batch_size=4, validation_rows=4, report_to="none")
    train(system, write_numbers(tmp_path / "data"), config, tmp_path / "run")
    assert system.module.bias.device.type == "cpu" and system.module.bias.any()
