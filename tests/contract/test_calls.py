"""What a call of the UNet brings besides image prompts, and how calls differ."""

import torch
from against_diffusers import tokens_of
from tiny_pipelines import tiny_adapter, tiny_features, tiny_pipeline

from imprompt.adapters import combine
from imprompt.adapters.attention import CONDITION_KEY


def test_masked_text_is_not_read(unet, base_adapter, make_features, inputs):
    latents, timesteps, text = inputs
    mask, other = torch.ones(2, 7), text.clone()
    mask[:, 4:], other[:, 4:] = 0, 5.0
    with base_adapter.install(unet) as handle, torch.no_grad():
        condition = handle.condition(base_adapter.tokens(*make_features(base_adapter)))
        outputs = [
            unet(
                latents,
                timesteps,
                states,
                encoder_attention_mask=mask,
                cross_attention_kwargs=condition,
            ).sample
            for states in (text, other)
        ]
    torch.testing.assert_close(*outputs)


def test_recorded_attention_is_the_texts_own(unet, base_adapter, make_features, inputs):
    seen = []
    with base_adapter.install(unet) as handle, torch.no_grad():
        tokens = base_adapter.tokens(*make_features(base_adapter))
        sites = combine(handle.condition(tokens), handle.condition(tokens.flip(0)))[CONDITION_KEY]
        watched = {
            i: s._replace(
                prompts=tuple(
                    p._replace(record=lambda text, image: seen.append(text.clone()))
                    for p in s.prompts
                )
            )
            for i, s in sites.items()
        }
        site = next(s for s in handle.sites if s.is_cross)
        site.module(torch.randn(2, 64, 16), encoder_hidden_states=inputs[2], image_prompts=watched)
    assert torch.equal(*seen)


def test_two_images_without_guidance_are_not_one_with_it():
    stock = tiny_pipeline("StableDiffusionPipeline", num_texts=2)
    adapter = tiny_adapter(stock.pipeline.unet)
    tokens, zeros = (
        tokens_of(adapter, *tiny_features(adapter)),
        tokens_of(adapter, *tiny_features(adapter, seed=2)),
    )
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    one = {name: stock.arguments[name][:1] for name in ("prompt_embeds", "negative_prompt_embeds")}
    with adapter.install(stock.pipeline.unet) as handle:
        with handle.prompt(tokens, zeros):
            stock.draw(latents=noise[:1], **one)  # one image, guided: a batch of two
            actual = stock.draw(latents=noise, guidance_scale=1.0)  # two images, not guided
        with handle.prompt(tokens, zeros):
            expected = stock.draw(latents=noise, guidance_scale=1.0)
    assert torch.equal(actual, expected)


def test_combining_keeps_other_keywords(unet, base_adapter, make_features):
    with base_adapter.install(unet) as handle:
        condition = handle.condition(base_adapter.tokens(*make_features(base_adapter)))
    assert combine({**condition, "scale": 0.3}, condition)["scale"] == 0.3
