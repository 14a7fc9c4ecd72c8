"""Weights may lie in memory with channels last; their moments must lie as they do, also after a resume."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_system import SmallSystem, write_numbers
from torch import nn

from imprompt.training.config import TrainConfig
from imprompt.training.loop import Interrupted, train

CONFIG = TrainConfig(
    steps=12, batch_size=4, learning_rate=0.01, checkpoint_every_steps=5, validation_rows=4
)


class Convolved(SmallSystem):
    """The law of numbers, learnt through two convolutions with channels last."""

    def __init__(self, stop_at_sample=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.module = nn.Sequential(
                *(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1))
            ).to(memory_format=torch.channels_last)
        self.stop_at_sample = stop_at_sample

    def loss(self, batch, randomness):
        if self.stop_at_sample in randomness.samples:
            os.kill(os.getpid(), signal.SIGTERM)
        noisy = batch["x"] + 0.1 * randomness.normal("noise", (3,))
        pixels = noisy[:, :, None, None].expand(-1, -1, 4, 4)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return (self.module(pixels).mean((2, 3)) - batch["y"]).square().mean(), {}

    def validate(self, batch, randomness):
        return {"error": self.loss(batch, randomness)[0].item()}

    def export(self, path):
        save_file({n: v.contiguous() for n, v in self.module.state_dict().items()}, path)


def test_stopped_and_resumed_is_bit_for_bit_the_same(tmp_path):
    columns = write_numbers(tmp_path / "data")
    straight = load_file(train(Convolved(), columns, CONFIG, tmp_path / "straight"))
    with pytest.raises(Interrupted):
        train(Convolved(stop_at_sample=30), columns, CONFIG, tmp_path / "stopped")
    system = Convolved()
    resumed = load_file(train(system, columns, CONFIG, tmp_path / "stopped"))
    assert system.module[0].weight.is_contiguous(memory_format=torch.channels_last)
    for name, weights in straight.items():
        assert torch.equal(weights, resumed[name]), name
