"""Stock diffusers pipelines draw with image prompts: by `condition`, or in a block of `prompt`."""

from contextlib import ExitStack

import pytest
import torch
from accelerate import cpu_offload
from against_diffusers import tokens_of
from tiny_pipelines import tiny_adapter, tiny_features, tiny_pipeline

from imprompt.adapters import VARIANTS
from imprompt.core.errors import ImpromptError

MAX_ROUNDING = 1e-4


@pytest.fixture
def stock():
    """Two texts."""
    return tiny_pipeline("StableDiffusionPipeline", num_texts=2)


@pytest.fixture
def unet(stock):
    return stock.pipeline.unet


@pytest.fixture
def adapter(unet):
    return tiny_adapter(unet)


@pytest.fixture
def tokens(adapter):
    """Of two samples."""
    return adapter.tokens(*tiny_features(adapter, batch=2))


@pytest.fixture
def zero_tokens(adapter):
    return adapter.tokens(*tiny_features(adapter, seed=2))


@pytest.fixture
def noise():
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def text(stock, row):
    """Arguments of a call with one of the texts."""
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: stock.arguments[name][row : row + 1] for name in names}


@pytest.mark.parametrize("variant", VARIANTS)
def test_condition_with_guidance(stock, unet, noise, variant):
    adapter = tiny_adapter(unet, variant)
    tokens = adapter.tokens(*tiny_features(adapter, batch=2))
    empty = torch.zeros_like(tokens)
    bare = stock.draw(latents=noise[:2])
    with adapter.install(unet) as handle:
        # The pipeline's batch is all negatives, then all positives.
        condition = handle.condition(torch.cat([empty, tokens]))
        together = stock.draw(latents=noise[:2], cross_attention_kwargs=condition)
        for j in range(2):
            condition = handle.condition(torch.cat([empty[:1], tokens[j : j + 1]]))
            one = {"latents": noise[j : j + 1], "cross_attention_kwargs": condition}
            alone = stock.draw(**text(stock, j), **one)
            assert (together[j] - alone[0]).abs().max() < MAX_ROUNDING
        silent = handle.condition(tokens, 0.0, lora_scale=0)
        assert torch.equal(stock.draw(latents=noise[:2], cross_attention_kwargs=silent), bare)
    assert (together - bare).abs().max() > 1e-2
    assert torch.equal(stock.draw(latents=noise[:2]), bare)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("num_images", [1, 2])
def test_a_prompt_for_each_text(
    stock, unet, adapter, tokens, zero_tokens, noise, guidance_scale, num_images
):
    """Each image is what it would be if it were drawn alone, mask and scale of its own too."""
    common = {"guidance_scale": guidance_scale}
    masks = torch.zeros(2, 16, 16)
    masks[0, :, :8] = masks[1, :8] = 1
    scales = torch.tensor([0.5, 1.5])
    latents = noise[: 2 * num_images]
    with adapter.install(unet) as handle:
        with handle.prompt(tokens, zero_tokens, scales, masks):
            together = stock.draw(latents=latents, num_images_per_prompt=num_images, **common)
        for j in range(2 * num_images):
            row = j // num_images
            own = tokens[row : row + 1], zero_tokens, float(scales[row]), masks[row]
            with handle.prompt(*own):
                alone = stock.draw(latents=latents[j : j + 1], **text(stock, row), **common)
            assert (together[j] - alone[0]).abs().max() < MAX_ROUNDING
        with handle.prompt(tokens.flip(0), zero_tokens, scales, masks):
            swapped = stock.draw(latents=latents, num_images_per_prompt=num_images, **common)
    assert (together - swapped).abs().max() > 1e-2


def test_a_prompt_for_each_image(stock, unet, adapter, zero_tokens, noise):
    tokens = adapter.tokens(*tiny_features(adapter, batch=4))
    with adapter.install(unet) as handle:
        with handle.prompt(tokens, zero_tokens):
            together = stock.draw(latents=noise, num_images_per_prompt=2)
        with handle.prompt(tokens[3:], zero_tokens):
            alone = stock.draw(latents=noise[3:], **text(stock, 1))
    assert (together[3] - alone[0]).abs().max() < MAX_ROUNDING


def test_without_zero_tokens_the_unconditional_half_is_bare(stock, unet, adapter, tokens, noise):
    with adapter.install(unet) as handle:
        with handle.prompt(tokens):
            actual = stock.draw(latents=noise[:2])
        condition = handle.condition(torch.cat([tokens, tokens]), torch.tensor([0.0, 0, 1, 1]))
        expected = stock.draw(latents=noise[:2], cross_attention_kwargs=condition)
    assert (actual - expected).abs().max() < MAX_ROUNDING


def test_zero_tokens_of_one_image_serve_for_several(stock, unet, adapter, tokens, zero_tokens):
    both = tokens.flatten(0, 1)[None]
    pictures = []
    with adapter.install(unet) as handle:
        for zeros in (zero_tokens, zero_tokens.repeat(1, 2, 1)):
            with handle.prompt(both, zeros):
                pictures.append(stock.draw())
    assert (pictures[0] - pictures[1]).abs().max() < MAX_ROUNDING


def test_several_images_from_one_noise(stock, unet, adapter, tokens, zero_tokens, noise):
    """Without guidance this looks like guidance, and has to be said."""
    same = noise[[0, 0]]
    with adapter.install(unet) as handle:
        with handle.prompt(tokens, zero_tokens, guidance=False):
            actual = stock.draw(latents=same, guidance_scale=1.0)
        condition = handle.condition(tokens)
        expected = stock.draw(latents=same, guidance_scale=1.0, cross_attention_kwargs=condition)
        with handle.prompt(tokens, zero_tokens, guidance=True):  # with guidance it changes nothing
            guided = stock.draw(latents=same)
        with handle.prompt(tokens, zero_tokens):
            assert torch.equal(stock.draw(latents=same), guided)
    assert (actual - expected).abs().max() < MAX_ROUNDING


def test_prompts_add_up_in_any_order(stock, unet, zero_tokens):
    adapters = [tiny_adapter(unet, "base"), tiny_adapter(unet, "plus", seed=1)]
    handles = [adapter.install(unet) for adapter in adapters]
    tokens = [tokens_of(adapter, *tiny_features(adapter)) for adapter in adapters]
    pictures = []
    for order in ((0, 1), (1, 0), (0,), (1,)):
        with ExitStack() as stack:
            for j in order:
                stack.enter_context(handles[j].prompt(tokens[j], scale=0.5))
            pictures.append(stock.draw())
    assert (pictures[0] - pictures[1]).abs().max() < MAX_ROUNDING
    assert all((pictures[0] - alone).abs().max() > 1e-2 for alone in pictures[2:])
    # Twice a half is the whole.
    with handles[0].prompt(tokens[0], scale=0.5), handles[0].prompt(tokens[0], scale=0.5):
        halves = stock.draw()
    with handles[0].prompt(tokens[0]):
        assert (halves - stock.draw()).abs().max() < MAX_ROUNDING


def test_a_block_leaves_nothing_behind(stock, unet, adapter, tokens):
    bare, processors = stock.draw(), dict(unet.attn_processors)
    dictionary = dict(vars(unet))
    with adapter.install(unet) as handle:
        installed = dict(unet.attn_processors)
        with pytest.raises(KeyboardInterrupt), handle.prompt(tokens):
            assert (stock.draw() - bare).abs().max() > 1e-2
            raise KeyboardInterrupt
        assert unet.attn_processors == installed
        assert torch.equal(stock.draw(), bare)
    assert not unet._forward_pre_hooks and not unet._forward_pre_hooks_with_kwargs
    assert vars(unet).keys() == dictionary.keys()
    assert all(unet.attn_processors[name] is own for name, own in processors.items())
    assert torch.equal(stock.draw(), bare)


def test_other_models_are_left_alone(stock, unet, adapter, tokens):
    other = tiny_pipeline("StableDiffusionPipeline")
    expected = other.draw()
    with adapter.install(unet) as handle, handle.prompt(tokens):
        assert torch.equal(other.draw(), expected)


@pytest.mark.parametrize(
    "name", ["StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline"]
)
def test_controlnets_get_no_image(name):
    stock = tiny_pipeline(name, num_controls=2)
    unet, networks = stock.pipeline.unet, stock.pipeline.controlnet.nets
    processors = [dict(network.attn_processors) for network in networks]
    adapter = tiny_adapter(unet)
    first_calls = []

    def note(_network, _args, kwargs, output):
        assert not kwargs.get("cross_attention_kwargs")
        first_calls.append(output[1].clone())

    for network in networks:
        network.register_forward_hook(note, with_kwargs=True)
    num_steps = stock.arguments["num_inference_steps"]
    stock.draw()
    with adapter.install(unet) as handle:
        tokens = tokens_of(adapter, *tiny_features(adapter))
        with handle.prompt(tokens):
            stock.draw()
        stock.draw(cross_attention_kwargs=handle.condition(tokens))
        for network, before in zip(networks, processors, strict=True):
            assert all(network.attn_processors[key] is own for key, own in before.items())
    calls = [first_calls[j : j + 2] for j in range(0, 6 * num_steps, 2 * num_steps)]
    for call in calls[1:]:  # at the first step nothing they read has changed
        assert all(torch.equal(*pair) for pair in zip(call, calls[0], strict=True))


def test_weights_kept_elsewhere_between_calls(stock, unet, adapter, tokens, zero_tokens):
    with adapter.install(unet) as handle, handle.prompt(tokens, zero_tokens):
        expected = stock.draw()
    for network in (unet, stock.pipeline.vae):
        cpu_offload(network, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in unet.parameters())
    with adapter.install(unet) as handle, handle.prompt(tokens, zero_tokens):
        assert (stock.draw() - expected).abs().max() < MAX_ROUNDING


def test_half_precision(stock, unet, adapter, tokens, zero_tokens):
    with adapter.install(unet) as handle:
        with handle.prompt(tokens, zero_tokens):
            expected = stock.draw()
        bare = stock.draw()
        stock.pipeline.to(torch.bfloat16)
        with handle.prompt(tokens, zero_tokens):
            actual = stock.draw()
    error, effect = (actual - expected).abs().mean(), (expected - bare).abs().mean()
    assert error < 0.3 * effect


def test_gradient_reaches_the_tokens(unet, adapter, tokens):
    given = tokens.clone().requires_grad_()
    inputs = torch.randn(2, 4, 8, 8), 10, torch.randn(2, 7, 64)
    with torch.no_grad(), adapter.install(unet) as handle, handle.prompt(given):
        unet(*inputs)
    with adapter.install(unet) as handle, handle.prompt(given):
        with torch.no_grad():
            unet(*inputs)  # what was drawn first does not cut the graph
        unet(*inputs).sample.mean().backward()
    assert given.grad is not None and given.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(2, 4, 63)}, r"\(2, 4, 63\)"),
        ({"zero_tokens": torch.zeros(3, 4, 64)}, "1 or 2"),
        ({"zero_tokens": torch.zeros(1, 3, 64)}, r"\(1, 3, 64\)"),
        ({"scale": torch.ones(4)}, "4 numbers for tokens of 2"),
        ({"scale": {"upper": 1.0}}, '"upper"'),
        ({"mask": torch.ones(4, 8, 8)}, r"\(4, 8, 8\)"),
    ],
)
def test_mistakes(unet, adapter, arguments, message):
    given = {"tokens": torch.zeros(2, 4, 64), **arguments}
    with (
        adapter.install(unet) as handle,
        pytest.raises(ImpromptError, match=message),
        handle.prompt(**given),
    ):
        pass


def test_more_prompts_than_images(stock, unet, adapter, tokens):
    with adapter.install(unet) as handle:
        with handle.prompt(tokens), pytest.raises(ImpromptError, match="2 samples.*2 x 1 images"):
            stock.draw(**text(stock, 0))
        wrong = handle.prompt(tokens, guidance=True)
        with wrong, pytest.raises(ImpromptError, match="batch of 1"):
            stock.draw(**text(stock, 0), guidance_scale=1.0)


def test_removed_within_its_block(stock, unet, adapter, tokens):
    bare = stock.draw()
    handle = adapter.install(unet)
    with handle.prompt(tokens):
        handle.remove()
        with pytest.raises(ImpromptError, match="install it again"):
            stock.draw()
    assert torch.equal(stock.draw(), bare)
