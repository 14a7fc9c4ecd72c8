"""What a condition does to a UNet: per sample, per site, per region, several at once."""

import pytest
import torch

from imprompt.adapters import attention_sites, combine
from imprompt.core.errors import ImpromptError


@pytest.fixture
def installed(unet, adapter, make_features):
    with adapter.install(unet) as handle:
        yield handle, adapter.tokens(*make_features(adapter))


def test_prompts_of_a_batch_do_not_mix(installed, denoise):
    handle, tokens = installed
    together = denoise(handle.condition(tokens))
    for j in range(2):
        one = slice(j, j + 1)
        alone = denoise(handle.condition(tokens[one]), batch=one)
        torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=0)
    swapped = denoise(handle.condition(tokens.flip(0)))
    assert not torch.allclose(together, swapped, atol=1e-4)


def test_batch_repeated_for_guidance(installed, denoise):
    handle, tokens = installed
    twice = [0, 1, 0, 1]
    expected = denoise(handle.condition(tokens[twice]), batch=twice)
    actual = denoise(handle.condition(tokens), batch=twice)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_one_prompt_for_all(installed, denoise):
    handle, tokens = installed
    expected = denoise(handle.condition(tokens[[0, 0]]))
    actual = denoise(handle.condition(tokens[:1]))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_a_batch_that_cannot_be_divided(installed, denoise):
    handle, tokens = installed
    condition = handle.condition(tokens)
    with pytest.raises(ImpromptError, match="2 samples.*batch of 3"):
        denoise(condition, batch=[0, 1, 0])


def test_scale_per_sample(installed, denoise):
    handle, tokens = installed
    together = denoise(handle.condition(tokens, torch.tensor([0.3, 0.9])))
    for j, scale in enumerate((0.3, 0.9)):
        alone = denoise(handle.condition(tokens, scale))[j]
        torch.testing.assert_close(together[j], alone, atol=1e-5, rtol=0)


def test_scale_by_name_and_by_site_agree(unet, installed, denoise):
    handle, tokens = installed
    cross = [site for site in attention_sites(unet) if site.is_cross]
    numbers = [0.4 if site.name.startswith("up_blocks.1") else 1.0 for site in cross]
    assert 0 < numbers.count(0.4) < len(numbers)
    by_name = denoise(handle.condition(tokens, {"up_blocks.1": 0.4}))
    assert torch.equal(by_name, denoise(handle.condition(tokens, numbers)))
    assert torch.equal(by_name, denoise(handle.condition(tokens, {"up": 0.2, "up_blocks.1": 0.4})))
    assert not torch.equal(by_name, denoise(handle.condition(tokens)))


def test_a_mask_of_ones_changes_nothing(installed, denoise):
    handle, tokens = installed
    whole = denoise(handle.condition(tokens))
    masked = denoise(handle.condition(tokens, mask=torch.ones(64, 64)))
    torch.testing.assert_close(masked, whole, atol=1e-6, rtol=0)


def test_a_mask_of_zeros_is_scale_zero(installed, denoise):
    handle, tokens = installed
    silent = denoise(handle.condition(tokens, 0.0))
    masked = denoise(handle.condition(tokens, mask=torch.zeros(64, 64)))
    torch.testing.assert_close(masked, silent, atol=1e-6, rtol=0)


def test_masks_are_per_sample(installed, denoise):
    handle, tokens = installed
    masks = torch.stack([torch.ones(32, 32), torch.zeros(32, 32)]).bool()
    together = denoise(handle.condition(tokens, mask=masks))
    torch.testing.assert_close(together[0], denoise(handle.condition(tokens))[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        together[1], denoise(handle.condition(tokens, 0.0))[1], atol=1e-6, rtol=0
    )


def test_a_prompt_acts_where_its_mask_is(unet, installed, inputs):
    """At the first site, before anything spreads over the picture."""
    handle, tokens = installed
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1
    site = next(s for s in handle.sites if s.is_cross)
    states = torch.randn(2, 64, 16)

    def attend(scale):
        condition = handle.condition(tokens, scale, mask)
        return site.module(states, encoder_hidden_states=inputs[2], **condition).unflatten(
            1, (8, 8)
        )

    difference = (attend(1.0) - attend(0.0)).abs().amax(dim=(0, 3))
    assert difference[:, 4:].max() < 1e-6
    assert difference[:, :4].min() > 1e-5


def test_two_halves_of_one_prompt_make_the_whole(installed, denoise):
    handle, tokens = installed
    left = torch.zeros(1, 16, 16)
    left[..., :8] = 1
    halves = [handle.condition(tokens, mask=mask) for mask in (left, 1 - left)]
    torch.testing.assert_close(
        denoise(combine(*halves)), denoise(handle.condition(tokens)), atol=1e-5, rtol=0
    )


def test_several_adapters(unet, make_adapter, make_features, denoise):
    adapters = [make_adapter("base"), make_adapter("plus", seed=1)]
    handles = [adapter.install(unet) for adapter in adapters]
    conditions = [
        handle.condition(adapter.tokens(*make_features(adapter)), 0.5)
        for handle, adapter in zip(handles, adapters, strict=True)
    ]
    both = denoise(combine(*conditions))
    torch.testing.assert_close(both, denoise(combine(*reversed(conditions))), atol=1e-5, rtol=0)
    for condition in conditions:
        assert not torch.allclose(both, denoise(condition), atol=1e-4)
        assert torch.equal(denoise(combine(condition)), denoise(condition))


def test_the_lora_of_two_face_prompts_acts_once(unet, make_adapter, make_features, denoise):
    adapter = make_adapter("faceid")
    with adapter.install(unet) as handle:
        silent = handle.condition(adapter.tokens(*make_features(adapter)), 0.0)
        assert torch.equal(denoise(combine(silent, silent)), denoise(silent))
        assert not torch.equal(denoise(silent), denoise())


def test_two_face_adapters_act_both(unet, make_adapter, make_features, denoise):
    adapters = [make_adapter("faceid"), make_adapter("faceid", seed=1)]
    conditions = [
        adapter.install(unet).condition(adapter.tokens(*make_features(adapter)), 0.0)
        for adapter in adapters
    ]
    both = denoise(combine(*conditions))
    assert all(not torch.allclose(both, denoise(c), atol=1e-4) for c in conditions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": [1.0]}, "1 numbers, but there are"),
        ({"scale": {"upblocks.1": 0.5}}, 'nearest name is "up_blocks.1"'),
        ({"scale": float("nan")}, "finite"),
        ({"scale": torch.ones(3)}, "3 numbers for tokens of 2"),
        ({"scale": torch.ones(2, 2)}, "one number per sample"),
        ({"mask": torch.ones(3, 8, 8)}, r"\(3, 8, 8\)"),
        ({"mask": torch.ones(8, 8) * 255}, "outside"),
        ({"tokens": torch.zeros(2, 4, 63)}, r"\(2, 4, 63\)"),
        ({"tokens": torch.zeros(0, 4, 64)}, r"\(0, 4, 64\)"),
    ],
)
def test_mistakes(unet, base_adapter, arguments, message):
    with base_adapter.install(unet) as handle, pytest.raises(ImpromptError, match=message):
        handle.condition(**{"tokens": torch.zeros(2, 4, 64), **arguments})


def test_a_mask_of_another_shape_than_the_picture(installed, denoise):
    handle, tokens = installed
    with pytest.raises(ImpromptError, match="aspect ratio"):
        denoise(handle.condition(tokens, mask=torch.ones(16, 48)))


def test_combine_wants_conditions():
    with pytest.raises(ImpromptError, match="condition"):
        combine({"scale": 0.5})


def test_what_was_made_in_inference_mode_serves_outside_it(
    unet, base_adapter, make_features, denoise
):
    with torch.inference_mode():
        tokens = base_adapter.tokens(*make_features(base_adapter))
        scale, mask = torch.tensor([0.3, 0.9]), torch.ones(8, 8)
    with base_adapter.install(unet) as handle:
        output = denoise(handle.condition(tokens, scale, mask))
        expected = denoise(handle.condition(tokens.clone(), scale.clone(), mask.clone()))
        torch.testing.assert_close(output, expected)
        output.sum().backward()
        handle.condition(tokens, scale=0.6)
    assert all(site.to_v_ip.weight.grad is not None for site in base_adapter.site_weights.values())
