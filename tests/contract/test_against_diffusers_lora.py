"""Beside LoRA, of the UNet and of face-id adapters, pictures are those of diffusers too."""

import pytest
import torch
from against_diffusers import check_same, draw_there, load_there, tokens_of
from tiny_pipelines import tiny_adapter, tiny_features, tiny_pipeline

peft = pytest.importorskip("peft")

NAMES = ["StableDiffusionPipeline", "StableDiffusionXLPipeline"]


def add_lora(unet):
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    unet.add_adapter(config, adapter_name="style")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.mark.parametrize("lora", ["before", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_lora_of_the_unet(name, lora):
    stock = tiny_pipeline(name)
    unet = stock.pipeline.unet
    without_lora = stock.draw()
    adapter = tiny_adapter(unet)
    (positive,), (negative,) = tiny_features(adapter), tiny_features(adapter, seed=2)
    tokens, zero_tokens = tokens_of(adapter, positive), tokens_of(adapter, negative)
    if lora == "before":
        add_lora(unet)
    handle = adapter.install(unet)
    if lora == "after":
        add_lora(unet)
    bare = stock.draw()
    assert not torch.equal(bare, without_lora)
    pictures = []
    with handle.prompt(tokens, zero_tokens):
        for weight in (0.3, 1.0):
            unet.set_adapters("style", weight)
            pictures.append(stock.draw())
    handle.remove()
    assert torch.equal(stock.draw(), bare)
    load_there(stock, [adapter])
    for weight, actual in zip((0.3, 1.0), pictures, strict=True):
        unet.set_adapters("style", weight)
        check_same(actual, draw_there(stock, [negative], [positive]), bare)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-2


@pytest.mark.parametrize("way", ["prompt", "condition"])
def test_weight_of_the_lora_in_the_same_arguments(way):
    unet = tiny_pipeline("StableDiffusionPipeline").pipeline.unet
    adapter = tiny_adapter(unet)
    tokens = tokens_of(adapter, *tiny_features(adapter))
    inputs = torch.randn(2, 4, 8, 8), 10, torch.randn(2, 7, 64)
    handle = adapter.install(unet)
    add_lora(unet)
    condition = handle.condition(tokens)
    unweighted = unet(*inputs, cross_attention_kwargs=condition).sample
    if way == "prompt":
        with handle.prompt(tokens, guidance=False):
            actual = unet(*inputs, cross_attention_kwargs={"scale": 0.3}).sample
    else:
        actual = unet(*inputs, cross_attention_kwargs={"scale": 0.3, **condition}).sample
    unet.set_adapters("style", 0.3)
    expected = unet(*inputs, cross_attention_kwargs=condition).sample
    assert (expected - unweighted).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*NAMES, "StableDiffusionPAGPipeline"])
def test_face_id(name):
    stock = tiny_pipeline(name)
    adapter = tiny_adapter(stock.pipeline.unet, "faceid")
    (positive,), (negative,) = tiny_features(adapter), tiny_features(adapter, seed=2)
    bare = stock.draw()
    with adapter.install(stock.pipeline.unet) as handle:
        with handle.prompt(tokens_of(adapter, positive), tokens_of(adapter, negative)):
            actual = stock.draw()
        assert torch.equal(stock.draw(), bare)
    load_there(stock, [adapter])
    check_same(actual, draw_there(stock, [negative], [positive]), bare)


@pytest.mark.parametrize("shortcut", [False, True])
def test_face_id_plus(shortcut):
    stock = tiny_pipeline("StableDiffusionPipeline")
    adapter = tiny_adapter(stock.pipeline.unet, "faceid-plus")
    positive, negative = tiny_features(adapter), tiny_features(adapter, seed=2)
    tokens, zero_tokens = (
        tokens_of(adapter, *features, shortcut=shortcut) for features in (positive, negative)
    )
    bare = stock.draw()
    with adapter.install(stock.pipeline.unet) as handle, handle.prompt(tokens, zero_tokens):
        actual = stock.draw()
    load_there(stock, [adapter])
    projection = stock.pipeline.unet.encoder_hid_proj.image_projection_layers[0]
    projection.clip_embeds = torch.stack([negative[1], positive[1]])
    projection.shortcut = shortcut
    check_same(actual, draw_there(stock, [negative[0]], [positive[0]]), bare)


def test_two_face_ids_act_both_and_leave():
    stock = tiny_pipeline("StableDiffusionPipeline")
    unet = stock.pipeline.unet
    bare = stock.draw()
    adapters = [tiny_adapter(unet, "faceid", seed) for seed in (0, 1)]
    tokens = [tokens_of(adapter, *tiny_features(adapter)) for adapter in adapters]
    handles = [adapter.install(unet) for adapter in adapters]
    alone = []
    for handle, own in zip(handles, tokens, strict=True):
        with handle.prompt(own, own):
            alone.append(stock.draw())
    with handles[0].prompt(tokens[0], tokens[0]), handles[1].prompt(tokens[1], tokens[1]):
        both = stock.draw()
    assert all((both - one).abs().max() > 1e-2 for one in alone)
    # The LoRA of one adapter acts once, however many prompts it has.
    silent = tokens[0] * 0
    with handles[0].prompt(silent), handles[0].prompt(silent):
        twice = stock.draw()
    with handles[0].prompt(silent):
        once = stock.draw()
    torch.testing.assert_close(twice, once, atol=1e-5, rtol=0)
    assert (once - bare).abs().max() > 1e-2
    for handle in handles:
        handle.remove()
    assert torch.equal(stock.draw(), bare)
