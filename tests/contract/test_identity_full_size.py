"""Identity and face-id on a model of Stable Diffusion 1.5's size: its shapes, and three real steps."""

import os

import pytest
import torch
from tiny_base import build_scheduler

from imprompt.bases.stable_diffusion import StableDiffusionBase
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns, ColumnsWriter
from imprompt.systems import face_id, identity

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "IMPROMPT_SLOW_TESTS" not in os.environ,
        reason="takes minutes and 12 GB; set IMPROMPT_SLOW_TESTS=1",
    ),
]
LATENT_SIDE = 32  # 256 pixels


def random_base(device):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    )
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
        )


@pytest.fixture
def columns(tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusionBase, "fingerprint", lambda _: "random")
    monkeypatch.setattr(
        StableDiffusionBase, "tokenize", lambda _, texts: torch.ones(len(texts), 77).long()
    )
    (tmp_path / "data").mkdir()
    writer = ColumnsWriter(tmp_path / "data", 2)
    latents = torch.randn(2, 4, LATENT_SIDE, LATENT_SIDE)
    writer.write(
        0,
        {
            "latent_mean": latents,
            "latent_logvar": latents - 9,
            "id_embeds": torch.nn.functional.normalize(torch.randn(2, 512), dim=1),
            "landmarks": torch.rand(2, 5, 2),
            "text_ids": torch.randint(0, 49408, (2, 77)),
        },
    )
    writer.finish(2, {"base_fingerprint": "random"})
    return Columns.open(tmp_path / "data")


def step(system, columns, number, device):
    batch = {k: v.to(device) for k, v in columns.rows(range(2), system.columns).items()}
    loss, _ = system.loss(batch, Randomness(0, range(2 * number, 2 * number + 2), device))
    loss.backward()
    assert all(p.grad is not None for p in system.module.parameters() if p.requires_grad)
    return loss


def test_identity_has_the_published_shapes(columns):
    base = random_base("meta")
    with torch.device("meta"):
        system = identity.build(identity.IdentityOptions(), base, columns)
    state = system.module.adapter.state_dict()
    assert state["image_proj.latents"].shape == (1, 16, 768)
    assert state["image_proj.proj_in.weight"].shape == (768, 512)
    assert sum("to_k_ip" in key for key in state) == 16
    net = sum(p.numel() for p in system.module.identity_net.parameters())
    assert net == 361_279_120  # as of every ControlNet for Stable Diffusion 1.5
    loss = step(system, columns, 0, "meta")
    assert loss.shape == ()


def test_face_id_has_the_published_shapes(columns):
    base = random_base("meta")
    with torch.device("meta"):
        system = face_id.build(face_id.FaceIdOptions(), base, columns)
    state = system.module.state_dict()
    assert state["image_proj.proj.0.weight"].shape == (1024, 512)
    assert state["ip_adapter.0.to_q_lora.down.weight"].shape == (128, 320)
    step(system, columns, 0, "meta")


def test_identity_takes_three_real_steps(columns):
    system = identity.build(identity.IdentityOptions(zero_entry=False), random_base("cpu"), columns)
    optimizer = torch.optim.AdamW(system.module.parameters(), lr=1e-5)
    before = system.module.identity_net.controlnet_mid_block.weight.clone()
    for number in range(3):
        loss = step(system, columns, number, "cpu")
        assert torch.isfinite(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(system.module.identity_net.controlnet_mid_block.weight, before)
