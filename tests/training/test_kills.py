"""kill -9 at random moments of a run of 200 steps: what comes out is what comes out without, to the bit.

Five kills; twenty with IMPROMPT_SLOW_TESTS=1.
"""

import torch
from killing import NUM_KILLS, run_once, run_with_kills
from safetensors.torch import load_file
from tiny_base import write_tiny_base

from imprompt.bases import load_base
from imprompt.data.prepare import prepare
from imprompt.training import log

SETTINGS = [
    "train.steps=200",
    "train.batch_size=2",
    "train.learning_rate=0.003",
    "train.precision=bfloat16",
    "train.ema_decay=0.9",
    "train.validation_rows=2",
    "train.validate_every_steps=25",
    "train.checkpoint_every_steps=9",
    "train.log_every_steps=2",
]


def test_a_killed_run_ends_as_one_that_was_left_alone(tmp_path):
    write_tiny_base(tmp_path / "base")
    prepare("diorama:12", tmp_path / "data", load_base(tmp_path / "base"))

    def command(output):
        return [
            *("-m", "imprompt", "train", "image-prompt", "--output", str(tmp_path / output)),
            *("--data", str(tmp_path / "data"), "--base", str(tmp_path / "base")),
            *(part for setting in SETTINGS for part in ("--set", setting)),
        ]

    def steps_done():
        lines = log.read(tmp_path / "killed/log.jsonl")
        return lines[-1]["step"] if lines else 0

    run_once(command("alone"))
    hits = run_with_kills(command("killed"), steps_done, total=190, seed=11)
    assert hits >= NUM_KILLS - 1  # at the very end a run may be faster than its murderer
    for name in ("log.jsonl", "best/best.json"):
        alone, killed = (tmp_path / run / name for run in ("alone", "killed"))
        assert alone.read_bytes() == killed.read_bytes(), name
    for name in ("adapter.safetensors", "best/adapter.safetensors"):
        alone, killed = (load_file(tmp_path / run / name) for run in ("alone", "killed"))
        assert all(torch.equal(alone[key], killed[key]) for key in alone), name
    assert len(log.read(tmp_path / "alone/log.jsonl")) == 100 + 8
