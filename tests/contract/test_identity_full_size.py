"""Identity and face-id on a model of Stable Diffusion 1.5's size: its shapes, and three real steps."""

import pytest
import torch
from full_size_base import full_size_base, step, two_rows, untrained
from slow import needs_slow_tests

from imprompt.systems import face_id, identity


@pytest.fixture
def columns(tmp_path, monkeypatch):
    untrained(monkeypatch)
    return two_rows(
        tmp_path / "data",
        id_embeds=torch.nn.functional.normalize(torch.randn(2, 512), dim=1),
        landmarks=torch.rand(2, 5, 2),
    )


def test_identity_has_the_published_shapes(columns):
    base = full_size_base("meta")
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
    base = full_size_base("meta")
    with torch.device("meta"):
        system = face_id.build(face_id.FaceIdOptions(), base, columns)
    state = system.module.state_dict()
    assert state["image_proj.proj.0.weight"].shape == (1024, 512)
    assert state["ip_adapter.0.to_q_lora.down.weight"].shape == (128, 320)
    step(system, columns, 0, "meta")


@pytest.mark.slow
@needs_slow_tests("takes minutes and 12 GB")
def test_identity_takes_three_real_steps(columns):
    system = identity.build(
        identity.IdentityOptions(zero_entry=False), full_size_base("cpu"), columns
    )
    optimizer = torch.optim.AdamW(system.module.parameters(), lr=1e-5)
    before = system.module.identity_net.controlnet_mid_block.weight.clone()
    for number in range(3):
        loss = step(system, columns, number, "cpu")
        assert torch.isfinite(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(system.module.identity_net.controlnet_mid_block.weight, before)
