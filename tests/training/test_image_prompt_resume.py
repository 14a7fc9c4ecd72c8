"""The real system, in the precision it is trained in: stop and resume is bit for bit the same; Ctrl-C."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_base import write_tiny_base

from imprompt.bases import load_base
from imprompt.data.prepare import prepare
from imprompt.training.run import run_training

SETTINGS = [
    "train.steps=12",
    "train.batch_size=4",
    "train.learning_rate=0.01",
    "train.precision=bfloat16",
    "train.ema_decay=0.9",
    "train.validation_rows=4",
    "train.checkpoint_every_steps=5",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_tiny_base(folder / "base")
    prepare("diorama:24", folder / "data", load_base(folder / "base"))
    return folder


def run(prepared, output):
    return run_training(
        "image-prompt",
        data=prepared / "data",
        base=str(prepared / "base"),
        output=output,
        settings=SETTINGS,
    )


def test_stopped_and_resumed_is_the_same_adapter(prepared, tmp_path, monkeypatch):
    straight = load_file(run(prepared, tmp_path / "straight"))
    from imprompt.systems.image_prompt import ImagePromptSystem

    original, calls = ImagePromptSystem.loss, 0

    def interrupting(self, batch, randomness):
        nonlocal calls
        calls += 1
        if calls == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, randomness)

    monkeypatch.setattr(ImagePromptSystem, "loss", interrupting)
    with pytest.raises(KeyboardInterrupt, match="step 7"):
        run(prepared, tmp_path / "stopped")
    resumed = load_file(run(prepared, tmp_path / "stopped"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_ctrl_c_on_the_command_line_saves_and_the_same_command_goes_on(prepared, tmp_path):
    command = [
        *(sys.executable, "-m", "imprompt", "train", "image-prompt"),
        *("--data", str(prepared / "data"), "--base", str(prepared / "base")),
        *("--output", str(tmp_path / "run")),
        *(part for setting in SETTINGS for part in ("--set", setting)),
        *("--set", "train.steps=2000"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (tmp_path / "run/log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in messages and "Traceback" not in messages
    again = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)
    deadline = time.monotonic() + 90
    seen = ""
    assert again.stderr is not None
    while "going on from step" not in seen and time.monotonic() < deadline:
        seen += again.stderr.read(1)
    again.kill()
    assert "going on from step" in seen
