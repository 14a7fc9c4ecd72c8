"""Exactly the adapter trains, and under every usual way of running a UNet."""

import copy
import subprocess
import sys

import pytest
import torch

from imprompt.adapters import add_lora, attention_sites, create_adapter
from imprompt.checkpoints import load_adapter, save_adapter
from imprompt.core.errors import ImpromptError


def gradients(adapter, loss):
    adapter.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


def test_every_parameter_of_the_adapter_and_no_other(unet, adapter, make_features, denoise):
    with adapter.install(unet) as handle:
        condition = handle.condition(adapter.tokens(*make_features(adapter)))
        found = gradients(adapter, denoise(condition).square().mean())
    assert found.keys() == dict(adapter.named_parameters()).keys()
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_the_saved_keys(unet, adapter):
    sites = attention_sites(unet)
    expected = {
        f"ip_adapter.{site.index}.{part}.weight"
        for site in sites
        if site.is_cross
        for part in ("to_k_ip", "to_v_ip")
    }
    if adapter.variant.startswith("faceid"):
        expected |= {
            f"ip_adapter.{site.index}.{part}_lora.{half}.weight"
            for site in sites
            for part in ("to_q", "to_k", "to_v", "to_out")
            for half in ("down", "up")
        }
    keys = set(adapter.state_dict())
    assert {key for key in keys if not key.startswith("image_proj.")} == expected
    assert {key.split(".")[0] for key in keys} == {"image_proj", "ip_adapter"}
    assert all(name.endswith("attn2") == site.is_cross for site in sites for name in [site.name])


def test_sites_are_counted_as_diffusers_does(unet):
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    assert [site.name for site in attention_sites(unet)] == names


def test_starts_from_the_text_weights(unet, adapter):
    for site in attention_sites(unet):
        if site.is_cross:
            weights = adapter.site_weights[site.index]
            assert torch.equal(weights.to_k_ip.weight, site.module.to_k.weight)
            assert torch.equal(weights.to_v_ip.weight, site.module.to_v.weight)


def test_a_new_face_adapter_has_a_silent_lora(unet, make_features, denoise):
    adapter = create_adapter(unet, "faceid", feature_dim=24, lora_rank=4)
    with adapter.install(unet) as handle:
        silent = denoise(handle.condition(adapter.tokens(*make_features(adapter)), 0.0))
    torch.testing.assert_close(silent, denoise(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", ["base", "plus"])
def test_a_lora_is_added_and_says_nothing_at_first(unet, make_features, denoise, variant, tmp_path):
    adapter = create_adapter(unet, variant, feature_dim=24, num_tokens=3)
    adapter.metadata["made"] = "before"
    features = make_features(adapter)
    with adapter.install(unet) as handle:
        before = denoise(handle.condition(adapter.tokens(*features)))
    grown = add_lora(adapter, unet, 2)
    assert (grown.lora_rank, grown.variant, grown.metadata) == (2, variant, {"made": "before"})
    with grown.install(unet) as handle:
        torch.testing.assert_close(denoise(handle.condition(grown.tokens(*features))), before)
        for weights in grown.site_weights.values():
            torch.nn.init.ones_(weights.to_q_lora.up.weight)
        now = denoise(handle.condition(grown.tokens(*features)))
    assert not torch.allclose(now, before, atol=1e-3)
    save_adapter(grown, tmp_path / "grown.safetensors")
    loaded = load_adapter(tmp_path / "grown.safetensors")
    assert (loaded.lora_rank, loaded.variant) == (2, variant)
    with loaded.install(unet) as handle:
        torch.testing.assert_close(denoise(handle.condition(loaded.tokens(*features))), now)
    with pytest.raises(ImpromptError, match="has a LoRA, of rank 2"):
        add_lora(grown, unet, 4)


def test_same_seed_same_adapter(unet):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (create_adapter(unet, "plus", feature_dim=8, seed=3) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)  # the caller's stream was left alone
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key])


def test_gradient_checkpointing(unet, adapter, make_features, denoise):
    features = make_features(adapter)
    with adapter.install(unet) as handle:
        plain = gradients(adapter, denoise(handle.condition(adapter.tokens(*features))).mean())
        unet.enable_gradient_checkpointing()
        unet.train()
        again = gradients(adapter, denoise(handle.condition(adapter.tokens(*features))).mean())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-4)


def test_half_precision_unet_with_float32_adapter(unet, adapter, make_features, inputs):
    features = make_features(adapter)
    with adapter.install(unet) as handle:
        expected = unet(*inputs, cross_attention_kwargs=handle.condition(adapter.tokens(*features)))
    half = copy.deepcopy(unet).to(torch.bfloat16)
    latents, timesteps, text = inputs
    with adapter.install(half) as handle:
        actual = half(
            latents.bfloat16(),
            timesteps,
            text.bfloat16(),
            cross_attention_kwargs=handle.condition(adapter.tokens(*features)),
        )
    assert actual.sample.dtype == torch.bfloat16
    assert (actual.sample.float() - expected.sample).abs().max() < 0.1


def test_autocast(unet, adapter, make_features, denoise):
    features = make_features(adapter)
    with adapter.install(unet) as handle, torch.autocast("cpu", dtype=torch.bfloat16):
        noise = denoise(handle.condition(adapter.tokens(*features)))
        found = gradients(adapter, noise.float().square().mean())
    assert found.keys() == dict(adapter.named_parameters()).keys()
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())


def test_peft_lora_on_the_unet(unet, base_adapter, make_features, denoise):
    peft = pytest.importorskip("peft")
    tokens = base_adapter.tokens(*make_features(base_adapter))
    with base_adapter.install(unet) as handle:
        without = denoise(handle.condition(tokens))
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    fresh = create_adapter(unet, feature_dim=24)  # reads K, V beneath the LoRA
    assert torch.equal(
        fresh.site_weights[1].to_k_ip.weight, base_adapter.site_weights[1].to_k_ip.weight
    )
    lora_only = denoise()
    with base_adapter.install(unet) as handle:
        both = denoise(handle.condition(tokens))
        assert torch.equal(denoise(handle.condition(tokens, 0.0)), lora_only)
    assert not torch.allclose(both, without, atol=1e-4)
    assert not torch.allclose(both, lora_only, atol=1e-4)


def test_parameters_on_stable_diffusion_15():
    """22,319,616: the figure of the published base adapter."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    adapter = create_adapter(unet, "base", feature_dim=1024)
    assert sum(p.numel() for p in adapter.parameters()) == 22_319_616
    assert sorted(adapter.site_weights) == list(range(1, 32, 2))


COMPILED = """
import torch
from conftest import features_of, small_adapter, small_unet
unet = small_unet()
adapter = small_adapter(unet, "faceid")
inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, 7, 64)
tokens = adapter.tokens(*features_of(adapter))
handle = adapter.install(unet)
mask = torch.zeros(1, 8, 8)
mask[..., :4] = 1
compiled = torch.compile(unet, backend="eager", fullgraph=True)
with torch.no_grad():
    for scale in (1.0, 0.6, 0.3):  # the scale is within V': no new graph
        condition = handle.condition(tokens, scale, mask)
        expected = unet(*inputs, cross_attention_kwargs=condition).sample
        actual = compiled(*inputs, cross_attention_kwargs=condition).sample
        assert torch.allclose(actual, expected, atol=1e-6)
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert frames == 1, frames
    again = adapter.install(compiled)
    assert again.condition(tokens).keys() == condition.keys()
    with again.prompt(tokens, scale=0.3, mask=mask):
        assert torch.allclose(compiled(*inputs).sample, expected, atol=1e-6)
"""


def test_compiles_into_one_graph(request):
    # In a process of its own, where no runtime type checks stand between the compiler and the code.
    source = request.config.rootpath / "src"
    result = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env={
            "PYTHONPATH": f"{source}:{request.path.parent}",
            "OMP_NUM_THREADS": "1",
            "HOME": "/tmp",
        },
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
