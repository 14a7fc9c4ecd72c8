"""Stable Diffusion 1 and 2 draw what the stock pipeline draws, also with an image prompt."""

from pathlib import Path

import numpy
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_base import IMAGE_SIZE_PX, TEXT_DIM, VISION_EMBED_DIM, write_tiny_base

from imprompt import ImagePrompt, create_adapter, generate
from imprompt.bases import load_base
from imprompt.generation import initial_noise

STEPS, GUIDANCE_SCALE, SEED = 4, 5.0, 3


@pytest.mark.parametrize(
    ("generation", "prediction_type"), [(1, "epsilon"), (2, "epsilon"), (2, "v_prediction")]
)
@pytest.mark.parametrize("scale", [0.0, 0.6])
def test_a_stock_pipeline_draws_the_same(
    tmp_path: Path, generation: int, prediction_type: str, scale: float
) -> None:
    folder = write_tiny_base(
        tmp_path / "tiny", prediction_type=prediction_type, generation=generation
    )
    base = load_base(folder)
    assert base.scheduler.config.prediction_type == prediction_type
    adapter = create_adapter(base.unet, feature_dim=VISION_EMBED_DIM)
    assert adapter.cross_attention_dim == generation * TEXT_DIM
    picture = torch.rand(3, IMAGE_SIZE_PX, IMAGE_SIZE_PX) * 2 - 1
    [image] = generate(
        base,
        "a red cat",
        ImagePrompt(picture, adapter=adapter, scale=scale),
        steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
        seed=SEED,
        progress=False,
    )
    ours = numpy.asarray(image, dtype=numpy.float64)

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert base.image_encoder is not None
    embeds = base.image_encoder.embeds(picture[None])

    def theirs(scale: float) -> numpy.ndarray:
        with torch.no_grad(), adapter.install(pipeline.unet) as handle:
            tokens = adapter.tokens(torch.cat([torch.zeros_like(embeds), embeds]))
            images = pipeline(
                "a red cat",
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                latents=initial_noise(SEED, [0], base.latent_shape()),
                cross_attention_kwargs=handle.condition(tokens, scale=scale) if scale else None,
                output_type="np",
            ).images
        return images[0] * 255

    assert abs(ours - theirs(scale)).max() <= 1
    # At another weight it is another picture: what is compared is not the text alone.
    assert abs(ours - theirs(scale + 0.4)).max() > 2
