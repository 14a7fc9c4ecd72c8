"""The same checkpoint here and by diffusers' `load_ip_adapter` gives the same picture."""

import pytest
import torch
from against_diffusers import VISIBLE, check_same, draw_there, load_there, tokens_of
from tiny_pipelines import PIPELINES, tiny_adapter, tiny_features, tiny_pipeline

from imprompt.adapters import combine

WITH_CONTROLS = [name for name, needed in PIPELINES.items() if {"control", "hint"} & set(needed)]


def compare(stock, variant="base", **changes):
    """Ours by `prompt`, ours by `condition`, theirs."""
    unet, has_guidance = stock.pipeline.unet, changes.pop("has_guidance", True)
    adapter = tiny_adapter(unet, variant)
    (positive,), (negative,) = tiny_features(adapter), tiny_features(adapter, seed=2)
    tokens, zero_tokens = tokens_of(adapter, positive), tokens_of(adapter, negative)
    bare = stock.draw(**changes)
    with adapter.install(unet) as handle:
        with handle.prompt(tokens, zero_tokens):
            by_prompt = stock.draw(**changes)
        rows = [0] * len(bare) + [1] * len(bare) if has_guidance else [1]
        stacked = torch.cat([zero_tokens, tokens])[rows]
        by_condition = stock.draw(cross_attention_kwargs=handle.condition(stacked), **changes)
    assert torch.equal(stock.draw(**changes), bare)
    load_there(stock, [adapter])
    expected = draw_there(stock, [negative] if has_guidance else None, [positive], **changes)
    check_same(by_prompt, expected, bare)
    check_same(by_condition, expected, bare)


@pytest.mark.parametrize("name", [name for name in PIPELINES if "PAG" not in name])
def test_every_pipeline(name):
    compare(tiny_pipeline(name), has_guidance="Consistency" not in name)


@pytest.mark.parametrize("name", WITH_CONTROLS)
def test_several_controls(name):
    compare(tiny_pipeline(name, num_controls=2))


def test_inpainting_unet():
    """Of nine channels: latents, mask, and what stands around the hole."""
    compare(tiny_pipeline("StableDiffusionInpaintPipeline", in_channels=9))


@pytest.mark.parametrize("variant", ["plus", "full"])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_variants(name, variant):
    compare(tiny_pipeline(name), variant)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_without_guidance(name):
    changes = {"guidance_scale": 1.0, "num_images_per_prompt": 2}
    compare(tiny_pipeline(name), has_guidance=False, **changes)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLAdapterPipeline"])
def test_several_images_of_one_text(name):
    compare(tiny_pipeline(name), num_images_per_prompt=2)


def test_perturbed_attention_guidance():
    """Three parts: unconditional, conditional, perturbed."""
    stock = tiny_pipeline("StableDiffusionPAGPipeline")
    adapter = tiny_adapter(stock.pipeline.unet)
    (positive,), (negative,) = tiny_features(adapter), tiny_features(adapter, seed=2)
    tokens, zero_tokens = tokens_of(adapter, positive), tokens_of(adapter, negative)
    before = dict(stock.pipeline.unet.attn_processors)
    bare = stock.draw(num_images_per_prompt=2)
    handle = adapter.install(stock.pipeline.unet)
    with handle.prompt(tokens, zero_tokens):
        actual = stock.draw(num_images_per_prompt=2)
    with handle.prompt(tokens, zero_tokens, guidance=False):
        unguided = stock.draw(guidance_scale=1.0)
    handle.remove()
    after = stock.pipeline.unet.attn_processors
    assert all(after[name] is processor for name, processor in before.items())
    load_there(stock, [adapter])
    expected = draw_there(stock, [negative], [positive], num_images_per_prompt=2)
    check_same(actual, expected, bare)
    expected = draw_there(stock, None, [positive], guidance_scale=1.0)
    check_same(unguided, expected, bare[:1])


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_scale(name):
    stock = tiny_pipeline(name)
    adapter = tiny_adapter(stock.pipeline.unet)
    (positive,), (negative,) = tiny_features(adapter), tiny_features(adapter, seed=2)
    # A block that is not named has scale 0 there and scale 1 here.
    by_block = {"down": 0.0, "mid": 0.0, "up": 0.0, "up_blocks.1": 0.7}
    bare, actual = stock.draw(), []
    with adapter.install(stock.pipeline.unet) as handle:
        for scale in (0.6, by_block):
            with handle.prompt(tokens_of(adapter, positive), tokens_of(adapter, negative), scale):
                actual.append(stock.draw())
    load_there(stock, [adapter])
    for scale, picture in zip((0.6, {"up": {"block_1": 0.7}}), actual, strict=True):
        stock.pipeline.set_ip_adapter_scale(scale)
        check_same(picture, draw_there(stock, [negative], [positive]), bare)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLInpaintPipeline"])
def test_masks(name):
    """Two images of one adapter, each in its half."""
    stock = tiny_pipeline(name)
    adapter = tiny_adapter(stock.pipeline.unet)
    (positive,) = tiny_features(adapter, batch=2)
    (negative,) = tiny_features(adapter, batch=2, seed=2)
    left = torch.zeros(32, 32)
    left[:, :16] = 1
    masks = torch.stack([left, 1 - left])
    bare = stock.draw()
    with adapter.install(stock.pipeline.unet) as handle:
        first, second = (
            handle.prompt(adapter.tokens(p), adapter.tokens(n), mask=mask)
            for p, n, mask in zip(positive.split(1), negative.split(1), masks, strict=True)
        )
        with first, second:
            actual = stock.draw()
    load_there(stock, [adapter])
    unmasked = draw_there(stock, [negative], [positive])
    stock.pipeline.set_ip_adapter_scale([[1.0, 1.0]])
    masked = {"cross_attention_kwargs": {"ip_adapter_masks": [masks[None]]}}
    expected = draw_there(stock, [negative], [positive], **masked)
    check_same(actual, expected, bare)
    assert (unmasked - expected).abs().max() > VISIBLE


def test_several_images_of_one_adapter():
    stock = tiny_pipeline("StableDiffusionPipeline")
    adapter = tiny_adapter(stock.pipeline.unet)
    (positive,), (negative,) = tiny_features(adapter, batch=2), tiny_features(adapter, seed=2)
    bare = stock.draw()
    with (
        adapter.install(stock.pipeline.unet) as handle,
        handle.prompt(tokens_of(adapter, positive), tokens_of(adapter, negative)),
    ):
        actual = stock.draw()
    load_there(stock, [adapter])
    check_same(actual, draw_there(stock, [negative.expand(2, -1)], [positive]), bare)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLControlNetPipeline"])
def test_several_adapters(name):
    stock = tiny_pipeline(name)
    unet = stock.pipeline.unet
    adapters = [tiny_adapter(unet, "base"), tiny_adapter(unet, "plus", seed=1)]
    positive = [tiny_features(adapter)[0] for adapter in adapters]
    negative = [tiny_features(adapter, seed=2)[0] for adapter in adapters]
    scales, bare = [0.5, 0.9], stock.draw()
    handles = [adapter.install(unet) for adapter in adapters]
    tokens = [tokens_of(*pair) for pair in zip(adapters, positive, strict=True)]
    zeros = [tokens_of(*pair) for pair in zip(adapters, negative, strict=True)]
    rows = list(zip(handles, tokens, zeros, scales, strict=True))
    first, second = (handle.prompt(t, z, scale) for handle, t, z, scale in rows)
    with first, second:
        by_prompt = stock.draw()
    conditions = [handle.condition(torch.cat([z, t]), scale) for handle, t, z, scale in rows]
    by_condition = stock.draw(cross_attention_kwargs=combine(*conditions))
    with rows[0][0].prompt(*rows[0][1:]):
        by_both = stock.draw(cross_attention_kwargs=conditions[1])
    for handle in handles:
        handle.remove()
    load_there(stock, adapters)
    stock.pipeline.set_ip_adapter_scale(scales)
    expected = draw_there(stock, negative, positive)
    for actual in (by_prompt, by_condition, by_both):
        check_same(actual, expected, bare)


def test_from_a_file(tmp_path):
    from imprompt.checkpoints import load_adapter, save_adapter

    stock = tiny_pipeline("StableDiffusionPipeline")
    made = tiny_adapter(stock.pipeline.unet, "plus")
    save_adapter(made, tmp_path / "plus.safetensors")
    adapter = load_adapter(tmp_path / "plus.safetensors").requires_grad_(False)
    (positive,), (negative,) = tiny_features(adapter), tiny_features(adapter, seed=2)
    bare = stock.draw()
    with (
        adapter.install(stock.pipeline.unet) as handle,
        handle.prompt(tokens_of(adapter, positive), tokens_of(adapter, negative)),
    ):
        actual = stock.draw()
    stock.pipeline.load_ip_adapter(str(tmp_path), "", "plus.safetensors", image_encoder_folder=None)
    check_same(actual, draw_there(stock, [negative], [positive]), bare)
