"""A system that trains in milliseconds, and data for it."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from imprompt.data.dataset import Columns, ColumnsWriter


def write_numbers(folder: Path, count: int = 64) -> Columns:
    """Columns `x` (count, 3) and `y` (count, 1) with a linear law between them."""
    folder.mkdir(parents=True)
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3
    writer = ColumnsWriter(folder)
    writer.write(0, {"x": x, "y": y})
    writer.finish(count, {"source": "numbers"})
    return Columns.open(folder)


class SmallSystem:
    """Linear regression on noisy inputs; the noise comes from the batch's randomness."""

    columns = ("x", "y")

    def __init__(
        self,
        fail_at_sample: int | None = None,
        unused: bool = False,
        fail_gradient_at_sample: int | None = None,
    ) -> None:
        self.module = nn.Linear(3, 1)
        with torch.no_grad():
            self.module.weight.zero_()
            self.module.bias.zero_()
        if unused:
            self.module.register_parameter("unused", nn.Parameter(torch.zeros(1)))
        self.fail_at_sample = fail_at_sample
        self.fail_gradient_at_sample = fail_gradient_at_sample
        self.seen: list[int] = []

    def loss(self, batch, randomness):
        self.seen += randomness.samples
        noisy = batch["x"] + 0.1 * randomness.normal("noise", (3,))
        loss = (self.module(noisy) - batch["y"]).square().mean()
        if self.fail_at_sample in randomness.samples:
            loss = loss * float("nan")
        if self.fail_gradient_at_sample in randomness.samples:
            loss = loss + (0 * self.module.bias.sum()).sqrt()  # 0, with a slope of 0 · infinity
        return loss, {"mean_x": batch["x"].mean()}

    def validate(self, batch, randomness):
        return {"error": (self.module(batch["x"]) - batch["y"]).square().mean().item()}

    def export(self, path):
        save_file(self.module.state_dict(), path)
