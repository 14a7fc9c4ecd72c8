"""An adapter on a UNet leaves no trace: not while it is silent, not after it is gone."""

import copy
import logging
import warnings

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from imprompt.core.errors import ImpromptError


def test_remove_restores_the_very_objects(unet, adapter, make_features, denoise):
    before = dict(unet.attn_processors)
    described, keys, bare = repr(unet), list(unet.state_dict()), denoise()

    handle = adapter.install(unet)
    assert repr(unet) == described
    assert list(unet.state_dict()) == keys
    assert not torch.equal(denoise(handle.condition(adapter.tokens(*make_features(adapter)))), bare)
    handle.remove()

    after = dict(unet.attn_processors)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(denoise(), bare)
    handle.remove()  # harmless


def test_installed_but_not_asked(unet, adapter, denoise):
    bare = denoise()
    with adapter.install(unet):
        assert torch.equal(denoise(), bare)


@pytest.mark.parametrize("kind", ["number", "sites", "names"])
def test_zero_scale_is_the_bare_model(unet, adapter, make_features, denoise, kind):
    bare = denoise()
    with adapter.install(unet) as handle:
        num_sites = sum(site.is_cross for site in handle.sites)
        scale = {"number": 0, "sites": [0.0] * num_sites, "names": {"down": 0, "mid": 0, "up": 0}}
        condition = handle.condition(
            adapter.tokens(*make_features(adapter)), scale[kind], lora_scale=0
        )
        assert condition == {"image_prompts": {}}  # nothing to compute, hence no cost
        assert torch.equal(denoise(condition), bare)


def test_nothing_is_printed(unet, adapter, make_features, denoise, capfd):
    loggers = [logging.getLogger(n) for n in logging.root.manager.loggerDict if "diffusers" in n]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(), adapter.install(unet) as handle:
            warnings.simplefilter("error")
            denoise(handle.condition(adapter.tokens(*make_features(adapter)), scale={"up": 0.5}))
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert capfd.readouterr() == ("", "")


def test_two_adapters_leave_in_any_order(unet, make_adapter, make_features, denoise):
    before, bare = dict(unet.attn_processors), denoise()
    for order in ((0, 1), (1, 0)):
        adapters = make_adapter("base"), make_adapter("faceid", seed=1)
        handles = [adapter.install(unet) for adapter in adapters]
        first, last = order
        tokens = adapters[last].tokens(*make_features(adapters[last]))
        expected = denoise(handles[last].condition(tokens))
        handles[first].remove()
        assert torch.equal(denoise(handles[last].condition(tokens)), expected)
        handles[last].remove()
        assert all(unet.attn_processors[name] is before[name] for name in before)
        assert torch.equal(denoise(), bare)


def test_processors_changed_meanwhile(unet, base_adapter, make_features, denoise):
    tokens = base_adapter.tokens(*make_features(base_adapter))
    with base_adapter.install(unet) as handle:
        expected = denoise(handle.condition(tokens))

    unet.set_attention_slice("auto")  # before
    sliced = dict(unet.attn_processors)
    with base_adapter.install(unet) as handle:
        actual = denoise(handle.condition(tokens))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert all(unet.attn_processors[name] is sliced[name] for name in sliced)

    unet.set_default_attn_processor()
    with base_adapter.install(unet) as handle:
        unet.set_attention_slice("auto")  # after
        actual = denoise(handle.condition(tokens))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert (
        "Sliced"
        in type(unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor).__name__
    )


def test_a_condition_after_remove(unet, base_adapter, make_features):
    handle = base_adapter.install(unet)
    handle.remove()
    with pytest.raises(ImpromptError, match="install it again"):
        handle.condition(base_adapter.tokens(*make_features(base_adapter)))


class Foreign(AttnProcessor2_0):
    """A processor whose name says nothing; it could do anything."""


@pytest.mark.parametrize("original", [AttnProcessor, Foreign])
def test_any_processor_can_be_beneath(unet, base_adapter, make_features, denoise, original):
    tokens = base_adapter.tokens(*make_features(base_adapter))
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :3] = 1
    with base_adapter.install(unet) as handle:
        expected = denoise(handle.condition(tokens, 0.7, mask))
    unet.set_attn_processor(original())
    with base_adapter.install(unet) as handle:
        actual = denoise(handle.condition(tokens, 0.7, mask))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_lora_beside_an_unknown_processor(unet, make_adapter, make_features, denoise, scale):
    adapter = make_adapter("faceid")
    tokens = adapter.tokens(*make_features(adapter))
    with adapter.install(unet) as handle:
        expected = denoise(handle.condition(tokens, scale))
    foreign = Foreign()
    unet.set_attn_processor(foreign)
    bare = denoise()
    with adapter.install(unet) as handle:
        actual = denoise(handle.condition(tokens, scale))
        assert torch.equal(denoise(), bare)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert all(processor is foreign for processor in unet.attn_processors.values())
    assert not any(module._forward_hooks for module in unet.modules())


def test_a_forgotten_handle_holds_nothing(unet, base_adapter):
    """As in a notebook whose cell is run twice."""
    before = dict(unet.attn_processors)
    handle = base_adapter.install(unet)
    handle = base_adapter.install(unet)
    handle.remove()
    assert all(unet.attn_processors[name] is before[name] for name in before)


def test_a_copy_of_a_unet_does_not_hold_its_handles(unet, base_adapter):
    with base_adapter.install(unet):
        copied = copy.deepcopy(unet)
    base_adapter.install(copied).remove()
    kinds = {type(processor).__name__ for processor in copied.attn_processors.values()}
    assert kinds == {type(processor).__name__ for processor in unet.attn_processors.values()}
