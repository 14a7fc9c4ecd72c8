"""A stock diffusers pipeline takes a condition as it takes any `cross_attention_kwargs`."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline


@pytest.fixture
def generate(unet):
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 7, 64, generator=generator)
    latents = torch.randn(2, 4, 8, 8, generator=generator)

    def call(condition, rows=slice(0, 2)):
        return pipeline(
            prompt_embeds=text[rows],
            negative_prompt_embeds=torch.zeros_like(text[rows]),
            latents=latents[rows],
            num_inference_steps=3,
            guidance_scale=4.0,
            cross_attention_kwargs=condition,
            output_type="latent",
        ).images

    return call


def test_with_guidance(unet, adapter, make_features, generate):
    tokens = adapter.tokens(*make_features(adapter)).detach()
    empty = torch.zeros_like(tokens)
    bare = generate(None)
    with adapter.install(unet) as handle:
        # The pipeline's batch is all negatives, then all positives.
        together = generate(handle.condition(torch.cat([empty, tokens])))
        for j in range(2):
            row = slice(j, j + 1)
            alone = generate(handle.condition(torch.cat([empty[row], tokens[row]])), row)
            torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
        assert torch.equal(generate(handle.condition(tokens, 0.0, lora_scale=0)), bare)
    assert not torch.allclose(together, bare, atol=1e-2)
    assert torch.equal(generate(None), bare)
