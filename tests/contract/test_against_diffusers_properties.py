"""What diffusers tests of its IP-Adapters holds here, and so does what it gets wrong there."""

import copy

import pytest
import torch
from against_diffusers import nested, tokens_of
from diffusers import UNet2DConditionModel
from tiny_pipelines import TEXT_DIM, tiny_adapter, tiny_features, tiny_pipeline, tiny_unet
from torch import nn

from imprompt.checkpoints import load_adapter

PIPELINES = [
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionPAGPipeline",
    "LatentConsistencyModelPipeline",
]
LOUD = 42.0


@pytest.fixture
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_unet().eval().requires_grad_(False)


@pytest.fixture
def denoise(network):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 7, TEXT_DIM, generator=generator)

    def call(*prompts, unet=network):
        if not prompts:
            return unet(latents, 10, text).sample
        first, *others = prompts
        with first:
            return call(*others, unet=unet)

    return call


@pytest.mark.parametrize("variant", ["base", "plus"])
def test_adapters_of_a_unet(network, denoise, variant):
    """One, another, the first again, both with the second silent, one image given twice."""
    adapter, other = tiny_adapter(network, variant), tiny_adapter(network, variant)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    features = tiny_features(adapter, batch=2)
    tokens, other_tokens = adapter.tokens(*features), other.tokens(*features)
    bare = denoise()
    with adapter.install(network) as handle:
        first = denoise(handle.prompt(tokens))
    with other.install(network) as handle:
        second = denoise(handle.prompt(other_tokens))
    with adapter.install(network) as handle, other.install(network) as other_handle:
        again = denoise(handle.prompt(tokens))
        silent = denoise(handle.prompt(tokens), other_handle.prompt(other_tokens, scale=0))
        given_twice = denoise(handle.prompt(torch.cat([tokens, tokens], dim=1)))
    assert not torch.allclose(first, bare, atol=1e-4)
    assert not torch.allclose(second, first, atol=1e-4)
    assert torch.equal(again, first)
    assert torch.equal(silent, first)
    torch.testing.assert_close(given_twice, first, atol=1e-5, rtol=1e-4)


def test_loaded_in_several_ways(network, denoise, tmp_path):
    adapter = tiny_adapter(network, "plus")
    features = tiny_features(adapter)
    torch.save(nested(adapter), tmp_path / "a.bin")
    with adapter.install(network) as handle:
        expected = denoise(handle.prompt(adapter.tokens(*features)))
    loaded = load_adapter(tmp_path / "a.bin")
    with loaded.install(network) as handle:
        assert torch.equal(denoise(handle.prompt(loaded.tokens(*features))), expected)


@pytest.mark.parametrize("name", PIPELINES)
def test_silent_and_loud(name):
    """Scale 0 is the bare pipeline, a large one changes much; so with two, and with masks."""
    stock = tiny_pipeline(name)
    unet = stock.pipeline.unet
    adapters = [tiny_adapter(unet, "base"), tiny_adapter(unet, "faceid", seed=1)]
    tokens = [tokens_of(adapter, *tiny_features(adapter)) for adapter in adapters]
    bare = stock.draw()
    left = torch.zeros(16, 16)
    left[:, :8] = 1
    handles = [adapter.install(unet) for adapter in adapters]
    assert torch.equal(stock.draw(), bare)  # a call without an image
    for mask in (None, left):
        for scale in (0.0, LOUD):
            first, second = (
                handle.prompt(own, scale=scale, mask=mask, lora_scale=0)
                for handle, own in zip(handles, tokens, strict=True)
            )
            with first:
                one = stock.draw()
                with second:
                    two = stock.draw()
            if scale == 0:
                assert torch.equal(one, bare) and torch.equal(two, bare)
            else:
                assert (one - bare).abs().max() > 1e-2
                assert (two - one).abs().max() > 1e-2


@pytest.mark.parametrize("name", PIPELINES[:3])
def test_guidance_or_none(name):
    stock = tiny_pipeline(name)
    adapter = tiny_adapter(stock.pipeline.unet)
    tokens = tokens_of(adapter, *tiny_features(adapter))
    with adapter.install(stock.pipeline.unet) as handle, handle.prompt(tokens):
        without, with_guidance = (stock.draw(guidance_scale=scale) for scale in (1.0, 2.0))
    assert without.shape == with_guidance.shape
    assert (without - with_guidance).abs().max() > 1e-2


def test_a_saved_unet_is_without_the_adapter(network, denoise, tmp_path):
    adapter = tiny_adapter(network, "faceid")
    keys, bare = set(network.state_dict()), denoise()
    with (
        adapter.install(network) as handle,
        handle.prompt(tokens_of(adapter, *tiny_features(adapter))),
    ):
        network.save_pretrained(tmp_path)
    loaded, report = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(loaded.state_dict()) == keys
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert torch.equal(denoise(unet=loaded.eval()), bare)


def test_attention_slicing_within_a_prompt(network, denoise):
    adapter = tiny_adapter(network)
    tokens = tokens_of(adapter, *tiny_features(adapter))
    with adapter.install(network) as handle:
        expected = denoise(handle.prompt(tokens))
        with handle.prompt(tokens):
            network.set_attention_slice("max")
            torch.testing.assert_close(denoise(), expected, atol=1e-5, rtol=0)
    assert all("Sliced" in type(p).__name__ for p in network.attn_processors.values())


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no float8")
def test_float8_weights_before_and_after(network, denoise):
    adapter = tiny_adapter(network, "faceid")
    tokens = tokens_of(adapter, *tiny_features(adapter))
    with adapter.install(network) as handle:
        full = denoise(handle.prompt(tokens))
    noises = []
    for when in ("before", "after"):
        unet = copy.deepcopy(network)
        handle = adapter.install(unet) if when == "after" else None
        unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        handle = handle or adapter.install(unet)
        bare = denoise(unet=unet)
        noises.append(denoise(handle.prompt(tokens), unet=unet))
        handle.remove()
        assert torch.equal(denoise(unet=unet), bare)
        assert (noises[-1] - bare).abs().max() > 10 * (noises[-1] - full).abs().mean()
    assert torch.equal(*noises)


class PackedLinear(nn.Module):
    """As quantisation libraries make them: the weight's shape says nothing."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.step = linear.weight.abs().max() / 127
        packed = (linear.weight / self.step).round().to(torch.int8).reshape(-1, 1)
        self.register_buffer("weight", packed)
        self.bias = linear.bias

    def forward(self, x):
        weight = self.weight.to(x).reshape(self.out_features, self.in_features) * self.step
        return nn.functional.linear(x, weight, self.bias)


def test_a_quantised_unet(network, denoise):
    adapter = tiny_adapter(network, "faceid")
    tokens = tokens_of(adapter, *tiny_features(adapter))
    with adapter.install(network) as handle:
        expected = denoise(handle.prompt(tokens))
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
    bare = denoise()
    with adapter.install(network) as handle:
        actual = denoise(handle.prompt(tokens))
    assert torch.equal(denoise(), bare)
    assert not torch.equal(actual, expected)
    assert (actual - expected).abs().max() < 0.2 * (actual - bare).abs().max()
