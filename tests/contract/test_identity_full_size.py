"""Identity and face-id on a model of Stable Diffusion 1.5's size: shapes on the meta device, and (with
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
from imprompt.systems import face_id, identity

FACE_ID_SHAPES = {
    "faceid": {
        "image_proj.proj.0.weight": (1024, 512),
        "ip_adapter.0.to_q_lora.down.weight": (128, 320),
    },
    "faceid-plus": {
        "image_proj.perceiver_resampler.proj_in.weight": (768, 1280),
        "ip_adapter.0.to_q_lora.down.weight": (128, 320),
    },
}


@pytest.fixture
def columns(tmp_path, monkeypatch):
    untrained(monkeypatch)
    return prepared(
        tmp_path / "data",
        id_embeds=torch.nn.functional.normalize(torch.randn(4, 512), dim=1),
        id_lengths=20 + torch.rand(4, 1),
        reference_hidden_states=torch.randn(4, *VIT_H_STATES).half(),
        landmarks=torch.rand(4, 5, 2),
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
    assert step(system, columns, "meta").shape == ()


@pytest.mark.parametrize("variant", FACE_ID_SHAPES)
def test_face_id_has_the_published_shapes(columns, variant):
    base = full_size_base("meta", image_encoder=vit_h("meta"))
    with torch.device("meta"):
        system = face_id.build(face_id.FaceIdOptions(variant=variant), base, columns)
    state = system.module.state_dict()
    for name, shape in FACE_ID_SHAPES[variant].items():
        assert state[name].shape == shape
    assert step(system, columns, "meta").shape == ()


@pytest.mark.slow
@needs_slow_tests("takes minutes and 14 GB")
def test_identity_takes_three_real_steps(columns, tmp_path):
    system = identity.build(identity.IdentityOptions(), full_size_base("cpu"), columns)
    export = learns_in_three_steps(system, columns, tmp_path / "run")
    assert (export / "ControlNetModel" / "config.json").is_file()
    assert inspect(export / "ip-adapter.safetensors").variant == "plus"


@pytest.mark.slow
@needs_slow_tests("takes minutes and 8 GB")
@pytest.mark.parametrize("variant", FACE_ID_SHAPES)
def test_face_id_takes_three_real_steps(columns, variant, tmp_path):
    base = full_size_base("cpu", image_encoder=vit_h("cpu"))
    system = face_id.build(face_id.FaceIdOptions(variant=variant), base, columns)
    export = learns_in_three_steps(system, columns, tmp_path / "run", "adapter.safetensors")
    assert inspect(export).variant == variant
