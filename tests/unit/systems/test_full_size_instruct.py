"""Instruct on models of Stable Diffusion 1.5's and XL's size: published shapes, and (with
IMPROMPT_SLOW_TESTS=1) three real steps of the training loop on random weights."""

import pytest
import torch
from full_size_base import (
    VIT_H_STATES,
    full_size_base,
    learns_in_three_steps,
    prepared,
    step,
    untrained,
    vit_h,
)
from slow import needs_slow_tests

from imprompt.checkpoints import inspect
from imprompt.systems import instruct
from imprompt.systems.instruct_options import InstructOptions


def random_base(device, is_xl=False):
    return full_size_base(device, is_xl, vit_h(device))


@pytest.fixture
def columns(tmp_path, monkeypatch):
    untrained(monkeypatch)
    return prepared(
        tmp_path / "data",
        condition_states=torch.randn(4, *VIT_H_STATES).half(),
        instruction_ids=torch.randint(0, 49408, (4, 77)),
    )


def test_it_has_the_published_shapes(columns):
    base = random_base("meta")
    with torch.device("meta"):
        system = instruct.build(InstructOptions(), base, columns)
    shapes = {key: tuple(value.shape) for key, value in system.module.state_dict().items()}
    assert shapes["image_proj.latents"] == (1, 16, 768)
    assert shapes["image_proj.proj_in.weight"] == (768, 1280)
    assert shapes["image_proj.proj_new_input.weight"] == (768, 768)
    assert shapes["image_proj.layers.3.0.to_q.weight"] == (768, 768)
    assert shapes["image_proj.new_input_layers.3.1.1.weight"] == (1536, 768)
    assert shapes["ip_adapter.31.to_k_ip.weight"] == (1280, 768)
    assert sum("to_k_ip" in key for key in shapes) == 16
    assert step(system, columns, "meta").shape == ()


def test_for_xl_it_has_the_published_shapes_and_reads_the_first_text_encoder():
    base = random_base("meta", is_xl=True)
    with torch.device("meta"):
        adapter = instruct.instruct_adapter(InstructOptions(), base)
    shapes = {key: tuple(value.shape) for key, value in adapter.state_dict().items()}
    assert shapes["image_proj.latents"] == (1, 16, 1280)
    assert shapes["image_proj.proj_prompt_input.weight"] == (1280, 768)
    assert shapes["image_proj.proj_new_input.weight"] == (1280, 768)
    assert shapes["image_proj.proj_out.weight"] == (2048, 1280)
    assert sum(weights.numel() for weights in adapter.parameters()) == 530_636_544
    ids = torch.zeros(2, 154, dtype=torch.long, device="meta")
    states = base.instruct_states(ids)
    assert states.shape == (2, 77, 768)
    tokens = adapter.tokens(torch.zeros(2, 257, 1280, device="meta"), states, states)
    assert tokens.shape == (2, 16, 2048)


@pytest.mark.slow
@needs_slow_tests("takes minutes and 8 GB")
def test_it_takes_three_real_steps(columns, tmp_path):
    system = instruct.build(InstructOptions(), random_base("cpu"), columns)
    export = learns_in_three_steps(system, columns, tmp_path / "run", "adapter.safetensors")
    assert inspect(export).variant == "instruct"
