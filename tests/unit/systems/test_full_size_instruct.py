"""Instruct on a model of Stable Diffusion 1.5's size: its published shapes, and three real steps."""

import os

import pytest
import torch
from tiny_base import build_scheduler
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from imprompt.bases import ClipImageEncoder
from imprompt.bases.stable_diffusion import StableDiffusionBase
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns, ColumnsWriter
from imprompt.systems import instruct
from imprompt.systems.instruct import InstructOptions

LATENT_SIDE = 32  # 256 pixels


def random_base(device):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    )
    # ViT-H's states in shape; of its layers only as many as it takes to have a last one.
    vision = CLIPVisionConfig(
        hidden_size=1280, num_hidden_layers=1, num_attention_heads=16, patch_size=14,
        projection_dim=1024,
    )  # fmt: skip
    with torch.device(device):
        return StableDiffusionBase(
            name="of Stable Diffusion 1.5's size",
            unet=UNet2DConditionModel(cross_attention_dim=768, sample_size=64),
            vae=AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ),
            text_encoder=CLIPTextModel(text),
            tokenizer=None,
            scheduler=build_scheduler(),
            image_encoder=ClipImageEncoder(CLIPVisionModelWithProjection(vision)),
        )


@pytest.fixture
def columns(tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusionBase, "fingerprint", lambda _: "random")
    monkeypatch.setattr(
        StableDiffusionBase, "tokenize", lambda _, texts: torch.ones(len(texts), 77).long()
    )
    (tmp_path / "data").mkdir()
    latents = torch.randn(2, 4, LATENT_SIDE, LATENT_SIDE)
    ids = torch.randint(0, 49408, (2, 77))
    writer = ColumnsWriter(tmp_path / "data", 2)
    writer.write(
        0,
        {
            "latent_mean": latents,
            "latent_logvar": latents - 9,
            "condition_states": torch.randn(2, 257, 1280).half(),
            "instruction_ids": ids,
            "text_ids": ids.roll(1, 0),
        },
    )
    writer.finish(2, {"base_fingerprint": "random"})
    return Columns.open(tmp_path / "data")


def step(system, columns, number, device):
    batch = {k: v.to(device) for k, v in columns.rows(range(2), system.columns).items()}
    loss, _ = system.loss(batch, Randomness(0, range(2 * number, 2 * number + 2), device))
    loss.backward()
    assert all(p.grad is not None for p in system.module.parameters())
    return loss


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
    assert step(system, columns, 0, "meta").shape == ()


@pytest.mark.slow
@pytest.mark.skipif(
    "IMPROMPT_SLOW_TESTS" not in os.environ,
    reason="takes minutes and 8 GB; set IMPROMPT_SLOW_TESTS=1",
)
def test_it_takes_three_real_steps(columns):
    system = instruct.build(InstructOptions(), random_base("cpu"), columns)
    optimizer = torch.optim.AdamW(system.module.parameters(), lr=1e-4)
    before = {name: value.clone() for name, value in system.module.state_dict().items()}
    for number in range(3):
        assert torch.isfinite(step(system, columns, number, "cpu"))
        optimizer.step()
        optimizer.zero_grad()
    after = system.module.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in before.items())
