"""What is asked of the denoiser is asked of the networks that train beside it, too."""

import pytest
import torch
from tiny_base import write_tiny_base

from imprompt.bases import load_base
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns
from imprompt.data.prepare import prepare
from imprompt.training.config import TrainConfig
from imprompt.training.denoiser import set_up_denoiser
from imprompt.training.parallel import trained_parameters
from imprompt.training.run import prepare_run

CONTROL = {"columns": ("latent_mean", "latent_logvar", "text_ids", "control_depth")}
CASES = {
    "controlnet": ("diorama:4", CONTROL, ["system.kind=depth"]),
    "identity": ("diorama-people:4", {"variant": "identity"}, []),
}


@pytest.fixture(params=CASES)
def trained(request, tmp_path):
    """A system with a network of the denoiser's kind, that network, and a batch."""
    source, how, settings = CASES[request.param]
    base = load_base(write_tiny_base(tmp_path / "base"))
    columns = Columns.open(prepare(source, tmp_path / "data", base, **how))
    settings = ["train.steps=1", "train.validation_rows=1", *settings]
    system, _, _ = prepare_run(request.param, base, columns, None, settings)
    system.module.train()
    network = getattr(system, "net", system.module)
    return system, network, columns.rows(range(3), system.columns)


def gradients(system, batch):
    system.module.zero_grad()
    loss, _ = system.loss(batch, Randomness(0, range(3)))
    loss.backward()
    return [parameter.grad.clone() for _, parameter in trained_parameters(system.module)]


def test_activations_of_what_trains_are_computed_twice(trained):
    system, network, batch = trained
    plain = gradients(system, batch)
    set_up_denoiser(system, TrainConfig(steps=1, gradient_checkpointing=True))
    assert network.is_gradient_checkpointing and system.base.unet.is_gradient_checkpointing
    calls = []
    network.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for one, other in zip(plain, gradients(system, batch), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert len(calls) == 2


def test_blocks_of_what_trains_are_compiled(trained, monkeypatch):
    system, network, _ = trained
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    set_up_denoiser(system, TrainConfig(steps=1, compile_blocks=True))
    assert len(compiled) == len(set(compiled))
    for one in (network, system.base.unet):
        blocks = [m for m in one.modules() if type(m).__name__ == "BasicTransformerBlock"]
        assert blocks and set(blocks) <= set(compiled)
