"""Stable Diffusion XL draws what the stock pipeline draws, with and without an image prompt."""

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tiny_base import (
    IMAGE_SIZE_PX,
    POOLED_DIM,
    SECOND_TEXT_DIM,
    TEXT_DIM,
    TEXT_LENGTH,
    VISION_EMBED_DIM,
    build_parts,
    write_tiny_xl_base,
)
from torch import Tensor

from imprompt import ImagePrompt, create_adapter, generate
from imprompt.bases import Base, ClipImageEncoder, TextStates, load_base
from imprompt.bases.extensions import add_textual_inversion
from imprompt.bases.stable_diffusion_xl import StableDiffusionXLBase, whole_picture
from imprompt.core.errors import ImpromptError
from imprompt.generation import initial_noise, sample_latents

STEPS, GUIDANCE_SCALE, SEED = 4, 5.0, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_xl_base(tmp_path_factory.mktemp("bases") / "tiny-xl")


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def image_encoder() -> ClipImageEncoder:
    return ClipImageEncoder(build_parts()["image_encoder"])


def stock_pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(folder: Path, texts: list[str], shape: tuple[int, ...], **options: Any) -> numpy.ndarray:
    images = stock_pipeline(folder)(
        texts,
        num_inference_steps=STEPS,
        latents=initial_noise(SEED, range(len(texts)), shape),
        output_type="np",
        **{"guidance_scale": GUIDANCE_SCALE, **options},
    ).images
    return images * 255


def ours(
    base: Base, texts: list[str], *image_prompts: ImagePrompt, **options: Any
) -> numpy.ndarray:
    options = {"guidance_scale": GUIDANCE_SCALE, **options}
    images = generate(base, texts, image_prompts, steps=STEPS, seed=SEED, progress=False, **options)
    return numpy.stack([numpy.asarray(image, dtype=numpy.float64) for image in images])


def assert_same_images(ours: numpy.ndarray, theirs: numpy.ndarray) -> None:
    assert abs(ours - theirs).max() <= 1
    assert ours.std() > 10


@pytest.mark.parametrize("negative", [None, "", "red"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_stock_pipeline_draws_the_same(
    tmp_path: Path, prediction_type: str, negative: str | None
) -> None:
    folder = write_tiny_xl_base(tmp_path / "tiny", prediction_type=prediction_type)
    base = load_base(folder)
    texts = ["a red cat", "cat"]
    negatives = None if negative is None else [negative] * 2
    expected = theirs(folder, texts, base.latent_shape(), negative_prompt=negatives)
    assert_same_images(ours(base, texts, negative_prompt=negative), expected)


def test_it_is_guided_as_its_stock_pipeline_is(base: Base) -> None:
    theirs = inspect.signature(StableDiffusionXLPipeline.__call__).parameters["guidance_scale"]
    assert base.guidance_scale == theirs.default


def test_without_guidance_too(folder: Path, base: Base) -> None:
    expected = theirs(folder, ["a red cat"], base.latent_shape(), guidance_scale=1.0)
    assert_same_images(ours(base, ["a red cat"], guidance_scale=1.0), expected)


def test_other_sizes_have_their_own_framing(folder: Path, base: Base) -> None:
    expected = theirs(folder, ["cat"], base.latent_shape((48, 32)), height=48, width=32)
    drawn = ours(base, ["cat"], size_px=(48, 32))
    assert drawn.shape == (1, 48, 32, 3)
    assert_same_images(drawn, expected)


def test_models_that_want_the_empty_text_for_no_text(tmp_path: Path) -> None:
    folder = write_tiny_xl_base(tmp_path / "tiny", no_text_is_zero=False)
    base = load_base(folder)
    assert torch.equal(base.encode_text([None]).sequence, base.encode_text([""]).sequence)
    assert_same_images(ours(base, ["cat"]), theirs(folder, ["cat"], base.latent_shape()))


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_with_an_image_prompt_a_stock_pipeline_draws_the_same(
    folder: Path, base: Base, image_encoder: ClipImageEncoder, scale: float
) -> None:
    adapter = create_adapter(base.unet, feature_dim=VISION_EMBED_DIM)
    assert len(adapter.site_weights) == sum("attn2" in x for x in base.unet.attn_processors) == 8
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, generator=generator) * 2 - 1
    prompt = ImagePrompt(pixels, adapter=adapter, scale=scale)

    embeds = image_encoder.embeds(pixels[None])
    pipeline = stock_pipeline(folder)
    with torch.no_grad(), adapter.install(pipeline.unet) as handle:
        tokens = adapter.tokens(torch.cat([torch.zeros_like(embeds), embeds]))
        expected = (
            255
            * pipeline(
                "a red cat",
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                latents=initial_noise(SEED, [0], base.latent_shape()),
                cross_attention_kwargs=handle.condition(tokens, scale=scale),
                output_type="np",
            ).images
        )
    drawn = ours(base, ["a red cat"], prompt, image_encoder=image_encoder)
    assert_same_images(drawn, expected)
    assert abs(drawn - ours(base, ["a red cat"])).max() > 10


def test_both_encoders_are_read(base: Base, folder: Path) -> None:
    texts = ["red cat", "red " * 50]
    ids = base.tokenize(texts)
    assert ids.shape == (2, 2 * TEXT_LENGTH)
    states = base.encode_text(texts)
    assert states.sequence.shape == (2, TEXT_LENGTH, TEXT_DIM + SECOND_TEXT_DIM)
    assert states.pooled is not None and states.pooled.shape == (2, POOLED_DIM)
    again = base.encode_text(ids)
    assert torch.equal(again.sequence, states.sequence)
    assert again.pooled is not None and torch.equal(again.pooled, states.pooled)
    sequence, _, pooled, _ = stock_pipeline(folder).encode_prompt(
        texts, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(states.sequence, sequence)
    torch.testing.assert_close(states.pooled, pooled)


def test_the_pooled_state_is_that_of_the_text_s_end_whatever_words_it_has(
    folder: Path, copy: Path, tmp_path: Path
) -> None:
    """The published second encoder says that 2 ends a text; transformers then takes the largest number."""
    config = json.loads((copy / "text_encoder_2/config.json").read_text())
    (copy / "text_encoder_2/config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
    vectors = {"clip_l": torch.ones(1, TEXT_DIM), "clip_g": torch.ones(1, SECOND_TEXT_DIM)}
    save_file(vectors, tmp_path / "thing.safetensors")
    pooled = []
    for path in (folder, copy):
        base = load_base(path)
        add_textual_inversion(base, tmp_path / "thing.safetensors")
        pooled.append(base.encode_text(["a thing cat", "red cat"]).pooled)
    torch.testing.assert_close(pooled[0], pooled[1])


def test_framing_is_the_whole_picture_unless_given(base: Base) -> None:
    states = base.encode_text(["cat", "red"])
    latents = initial_noise(0, [0, 1], base.latent_shape((32, 48)))

    def denoise(framing: Tensor | None) -> Tensor:
        return base.denoise(latents, 500, replace(states, framing=framing))

    torch.testing.assert_close(denoise(whole_picture(32, 48).repeat(2, 1)), denoise(None))
    part = torch.tensor([[32.0, 48, 0, 0, 32, 48], [512, 512, 100, 0, 32, 48]])
    difference = (denoise(part) - denoise(None)).abs().amax((1, 2, 3))
    assert difference[0] < 1e-6 and difference[1] > 1e-4


def test_framing_reaches_the_loop_exactly(base: Base) -> None:
    """Sizes above 2048 px are no longer exact in half precision."""
    framing = torch.tensor([[3001.0, 4001, 0, 0, 3001, 4001]])
    states = replace(base.encode_text(["cat"]), framing=framing)
    moved = states.to("cpu", torch.float16)
    assert moved.sequence.dtype == torch.float16 and torch.equal(moved.framing, framing)
    negative = replace(base.encode_text([None]), framing=framing)
    framed = sample_latents(base, states, negative, steps=2)
    plain = sample_latents(base, base.encode_text(["cat"]), base.encode_text([None]), steps=2)
    assert (framed - plain).abs().max() > 1e-4
    with pytest.raises(ImpromptError, match="have 'framing' and some have none"):
        sample_latents(base, states, base.encode_text([None]), steps=2)


def test_its_own_scale_of_latents(base: Base) -> None:
    pixels = torch.rand(2, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX) * 2 - 1
    mean, deviation = base.latent_distribution(pixels)
    posterior = base.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, posterior.mean * 0.13025)
    torch.testing.assert_close(deviation, posterior.std * 0.13025)
    noise = torch.randn(mean.shape)
    assert torch.equal(base.encode_image(pixels, noise), mean + deviation * noise)
    decoded = base.vae.decode(posterior.mean).sample
    torch.testing.assert_close(base.decode_image(mean), decoded, atol=1e-4, rtol=0)


def test_the_autoencoder_stays_in_full_precision_where_half_overflows(copy: Path) -> None:
    base = load_base(copy, dtype=torch.float16)
    assert {name: next(p.parameters()).dtype for name, p in base.parts().items()} == {
        "unet": torch.float16,
        "vae": torch.float32,
        "text_encoder": torch.float16,
        "text_encoder_2": torch.float16,
    }
    assert base.dtype == torch.float16
    pixels = torch.rand(1, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    full = load_base(copy)
    torch.testing.assert_close(base.encode_image(pixels), full.encode_image(pixels))
    latents = torch.randn(1, *base.latent_shape()).half()
    torch.testing.assert_close(base.decode_image(latents), full.decode_image(latents))
    assert base.fingerprint() == full.fingerprint()
    base.to("cpu", torch.bfloat16)
    assert base.vae.dtype == base.dtype == torch.bfloat16
    base.to("cpu", torch.float16)
    assert base.vae.dtype == torch.float32
    file = copy / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "force_upcast": False}))
    assert load_base(copy, dtype=torch.float16).vae.dtype == torch.float16


def test_in_half_precision_it_draws_nearly_the_same(folder: Path, base: Base) -> None:
    drawn = ours(load_base(folder, dtype=torch.bfloat16), ["a red cat"])
    assert abs(drawn - ours(base, ["a red cat"])).mean() < 5


def test_it_is_frozen_and_has_a_fingerprint_of_all_parts(base: Base, folder: Path) -> None:
    assert isinstance(base, StableDiffusionXLBase)
    for part in base.parts().values():
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
    other = load_base(folder)
    assert other.fingerprint() == base.fingerprint()
    with torch.no_grad():
        next(p for p in other.text_encoder_2.parameters() if p.ndim > 1).neg_()  # pyright: ignore
    assert other.fingerprint() != base.fingerprint()


def test_the_denoiser_lets_gradients_through(base: Base) -> None:
    states = base.encode_text(["red cat"])
    assert states.pooled is not None
    states.sequence.requires_grad_()
    states.pooled.requires_grad_()
    base.denoise(torch.randn(1, *base.latent_shape()), torch.tensor([7]), states).mean().backward()
    for tensor in (states.sequence, states.pooled):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "part",
    ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"],
)
def test_a_missing_part_is_named(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises(ImpromptError, match=f"its {part} could not be read"):
        load_base(copy)


def test_weights_with_holes_are_refused(copy: Path) -> None:
    file = next((copy / "text_encoder_2").glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["text_projection.weight"]
    save_file(tensors, file)
    with pytest.raises(ImpromptError, match="its text_encoder_2 lacks 1 tensors"):
        load_base(copy)


def changed(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_the_refiner_and_other_kinds_are_refused(copy: Path) -> None:
    changed(copy / "model_index.json", text_encoder=[None, None])
    with pytest.raises(ImpromptError, match="without its refiner"):
        load_base(copy)
    changed(copy / "model_index.json", unet=[None, None], transformer=["diffusers", "Some"])
    with pytest.raises(ImpromptError, match="its parts are .*transformer"):
        load_base(copy)


def test_noise_of_another_kind_is_refused(copy: Path) -> None:
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}))
    with pytest.raises(ImpromptError, match="EDMEulerScheduler without a beta_schedule"):
        load_base(copy)


def test_a_unet_that_reads_something_else_is_refused(copy: Path) -> None:
    tensors = load_file(copy / "unet" / "diffusion_pytorch_model.safetensors")
    tensors["add_embedding.linear_1.weight"] = torch.zeros(32, POOLED_DIM + 5 * 8)
    save_file(tensors, copy / "unet" / "diffusion_pytorch_model.safetensors")
    changed(copy / "unet/config.json", projection_class_embeddings_input_dim=POOLED_DIM + 5 * 8)
    with pytest.raises(ImpromptError, match="52 numbers .* make 60"):
        load_base(copy)


def test_rows_of_texts() -> None:
    states = TextStates(torch.randn(3, 2, 4), torch.randn(3, 5))
    chosen = states[[2, 0]]
    assert len(chosen) == 2 and torch.equal(chosen.sequence, states.sequence[[2, 0]])
    assert chosen.pooled is not None and states.pooled is not None
    joined = TextStates.join([states[2:], states[:1].expand(2)])
    assert joined.pooled is not None and torch.equal(joined.pooled, states.pooled[[2, 0, 0]])
    assert torch.equal(joined.sequence, states.sequence[[2, 0, 0]])
    with pytest.raises(ImpromptError, match="'pooled'"):
        TextStates.join([states, TextStates(states.sequence)])
