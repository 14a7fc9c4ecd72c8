"""Two processes, whatever the engine, learn what one process learns from the same global batches."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_system import SmallSystem
from tiny_base import write_tiny_base

from imprompt.bases import load_base
from imprompt.core.errors import ImpromptError
from imprompt.data.prepare import prepare
from imprompt.training.config import TrainConfig
from imprompt.training.engines import create_engine
from imprompt.training.processes import Processes, join_processes
from imprompt.training.run import run_training
from imprompt.training.state import whole_checkpoints

SETTINGS = [
    "train.steps=8",
    "train.batch_size=4",
    "train.learning_rate=0.001",
    "train.ema_decay=0.9",
    "train.validation_rows=4",
    "train.validate_every_steps=4",
    "train.checkpoint_every_steps=4",
    "train.log_every_steps=1",
    "train.report_to=none",
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with a base, data, and what one process made of them."""
    folder = tmp_path_factory.mktemp("engines")
    write_tiny_base(folder / "base")
    prepare("diorama:24", folder / "data", load_base(folder / "base"))
    run(folder, folder / "alone")
    return folder


def run(folder, output, *settings, system="image-prompt"):
    return run_training(
        system,
        data=folder / "data",
        base=str(folder / "base"),
        output=output,
        settings=[*SETTINGS, *settings],
    )


def torchrun(*arguments, timeout=300):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source = Path(__file__).parents[2] / "src"
    paths = f"{source}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--master_addr", "127.0.0.1", "--master_port", str(port), *arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # not killed: it ends those that it started
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def log_of(run_folder):
    return [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(first, second, weights="adapter.safetensors", tolerance=1e-5):
    """The loss curve, validation and weights, to float32's tolerance.

    Where a gradient is next to nothing, Adam makes of its rounding a step that can be seen.
    """
    for one, other in zip(log_of(first), log_of(second), strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=1e-5)
    one, other = (load_file(folder / weights) for folder in (first, second))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=1e-5)


def keep_first_checkpoint(source, target):
    """A run as it was when only its first checkpoint was there."""
    shutil.copytree(source, target)
    for path in whole_checkpoints(target / "checkpoints")[1:]:
        shutil.rmtree(path)
    shutil.rmtree(target / "best", ignore_errors=True)
    (target / "adapter.safetensors").unlink()


def test_the_product_s_own_command_with_two_processes_and_accumulation(alone, tmp_path):
    result = torchrun(
        *("-m", "imprompt", "train", "image-prompt", "--processes", "2"),
        *("--data", str(alone / "data"), "--base", str(alone / "base")),
        *("--output", str(tmp_path / "run")),
        *(part for setting in SETTINGS for part in ("--set", setting)),
        *("--set", "train.gradient_accumulation_steps=2"),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "in 2 processes (ddp)" in result.stderr
    assert_same_run(alone / "alone", tmp_path / "run")


@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_sharded_engines_learn_the_same_and_engines_go_on_from_each_other(alone, tmp_path, engine):
    if engine == "zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'imprompt[deepspeed]'")
    keep_first_checkpoint(alone / "alone", tmp_path / "taken-over")
    script = str(Path(__file__).with_name("engine_run.py"))
    outputs = [tmp_path / "run", tmp_path / "taken-over"]
    settings = json.dumps(SETTINGS)
    result = torchrun(script, engine, "image-prompt", alone, settings, *outputs)
    assert result.returncode == 0, result.stderr[-3000:]
    for output in outputs:
        assert_same_run(alone / "alone", output)
    keep_first_checkpoint(tmp_path / "run", tmp_path / "given-back")
    run(alone, tmp_path / "given-back")
    assert_same_run(alone / "alone", tmp_path / "given-back")


@pytest.fixture(scope="module")
def alone_with_maps(tmp_path_factory):
    """The same with depth maps, and what one process made a ControlNet of them, its weights channels last."""
    folder = tmp_path_factory.mktemp("controls")
    write_tiny_base(folder / "base")
    columns = ("latent_mean", "latent_logvar", "text_ids", "control_depth")
    prepare("diorama:24", folder / "data", load_base(folder / "base"), columns=columns)
    run(folder, folder / "alone", "system.kind=depth", system="controlnet")
    return folder


@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_sharded_engines_train_a_controlnet(alone_with_maps, tmp_path, engine):
    if engine == "zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'imprompt[deepspeed]'")
    script = str(Path(__file__).with_name("engine_run.py"))
    settings = json.dumps([*SETTINGS, "system.kind=depth"])
    result = torchrun(script, engine, "controlnet", alone_with_maps, settings, tmp_path / "run")
    assert result.returncode == 0, result.stderr[-3000:]
    weights = "control/diffusion_pytorch_model.safetensors"
    assert_same_run(alone_with_maps / "alone", tmp_path / "run", weights, tolerance=1e-4)


def test_a_frozen_base_stays_in_slices_and_the_end_waits_for_nobody(alone, tmp_path):
    """Nothing is validated at the end, so that the base is in slices when the first process exports."""
    script = str(Path(__file__).with_name("sharded_run.py"))
    result = torchrun(script, alone, tmp_path / "run", *SETTINGS, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    fingerprint = load_base(alone / "base").fingerprint()
    assert fingerprint in (tmp_path / "run/README.md").read_text()
    with safe_open(tmp_path / "run/adapter.safetensors", "pt") as file:
        assert fingerprint in json.dumps(file.metadata())


def test_parts_of_a_batch_add_up_to_the_batch(alone, tmp_path):
    run(alone, tmp_path / "run", "train.gradient_accumulation_steps=4")
    assert_same_run(alone / "alone", tmp_path / "run")


def test_computing_activations_twice_changes_nothing(alone, tmp_path):
    run(alone, tmp_path / "run", "train.gradient_checkpointing=true")
    assert_same_run(alone / "alone", tmp_path / "run")


def test_uneven_calls_do_not_go_with_slices_of_the_denoiser():
    """A process that asks it once more would wait for the others' weights for ever."""
    system = SmallSystem()
    system.calls_differ = True
    processes = Processes("fsdp2", 0, 1, torch.device("cpu"))
    with pytest.raises(ImpromptError, match="more often in one process"):
        create_engine(processes, system, TrainConfig(steps=1))


def test_what_cannot_be_shared_out_evenly_is_told(alone, tmp_path):
    with pytest.raises(ImpromptError, match="must be a multiple of 3"):
        run(alone, tmp_path / "run", "train.gradient_accumulation_steps=3")


def test_a_launcher_that_started_too_few_is_found_out(monkeypatch):
    with pytest.raises(ImpromptError, match=r"2 processes were asked for, and there is 1"):
        join_processes("auto", expected=2)
    with pytest.raises(ImpromptError, match="torchrun"):
        join_processes("zero2")
    with pytest.raises(ImpromptError, match="'horovod' is unknown"):
        join_processes("horovod")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ImpromptError, match="2 processes were started"):
        join_processes("single")
