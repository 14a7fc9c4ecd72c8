"""Generation that begins from a picture: as diffusers' pipelines do it, and what a mask keeps."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from imprompt.adapters import ImagePromptAdapter
from imprompt.bases import Base, load_base
from imprompt.cli.main import main
from imprompt.core.errors import ImpromptError
from imprompt.core.images import image_to_pixels
from imprompt.diffusion.samplers import create_sampler
from imprompt.generation import ImagePrompt, InitImage, generate
from imprompt.generation.init_image import start_of
from imprompt.generation.sampler import initial_noise

STEPS = 10
OPTIONS = {"steps": STEPS, "progress": False, "seed": 3}
PIPELINES = {
    "all": ("StableDiffusionImg2ImgPipeline", "pipeline_stable_diffusion_img2img"),
    "masked": ("StableDiffusionInpaintPipeline", "pipeline_stable_diffusion_inpaint"),
}


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).max())


@pytest.fixture
def photo(pictures: list[Image.Image]) -> Image.Image:
    return pictures[0]


@pytest.fixture
def right_half(left_half: torch.Tensor) -> Image.Image:
    return Image.fromarray(((1 - left_half) * 255).byte().numpy())


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++", "euler"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_start_is_drawn_from_as_in_diffusers(
    base: Base, photo: Image.Image, right_half: Image.Image, monkeypatch, kind, sampler, strength
) -> None:
    # Noise alone is what strength 1 means here; diffusers lays it on the picture without a mask.
    strength = 0.9 if strength == 1 and kind == "all" else strength
    name, module = PIPELINES[kind]
    pipeline = getattr(diffusers, name)(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        scheduler=create_sampler(sampler, base.scheduler.config, STEPS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(3, [0], base.latent_shape())
    package = diffusers.pipelines.stable_diffusion
    monkeypatch.setattr(getattr(package, module), "randn_tensor", lambda *_, **__: noise)
    latents = base.encode_image(image_to_pixels(photo)[None])
    masked: dict[str, Any] = {
        "mask_image": right_half,
        "masked_image_latents": latents,
        "height": 32,
        "width": 32,
    }
    masked = masked if kind == "masked" else {}
    stock = pipeline(
        "a cat",
        image=latents,
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=base.guidance_scale,
        **masked,
    ).images[0]

    mask = right_half if masked else None
    init = InitImage(image=photo, strength=strength, mask=mask)
    [own] = generate(base, "a cat", sampler=sampler, init_image=init, **OPTIONS)
    if masked:  # which diffusers leaves to the caller
        stock = Image.composite(stock, photo, right_half)
    assert difference(own, photo) > 8
    assert difference(own, stock) <= 1


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++", "euler", "pndm"])
def test_what_the_mask_keeps_stays_to_the_pixel(
    base: Base, photo: Image.Image, right_half: Image.Image, sampler: str
) -> None:
    init = InitImage(image=photo, strength=0.7, mask=right_half)
    one, other = generate(base, "", sampler=sampler, num_images=2, init_image=init, **OPTIONS)
    left, right = (0, 0, 16, 32), (16, 0, 32, 32)
    assert difference(one.crop(left), photo.crop(left)) == 0
    assert difference(one.crop(right), photo.crop(right)) > 8
    assert difference(one, other) > 2


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++", "euler", "pndm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_works_in_half_precision(folder, photo, right_half, sampler, dtype) -> None:
    base = load_base(folder, dtype=dtype)
    init = InitImage(image=photo, strength=0.7, mask=right_half)
    [image] = generate(base, "a cat", sampler=sampler, init_image=init, **OPTIONS)
    assert difference(image, photo) > 8 and np.asarray(image)[:, 16:].std() > 1


def test_little_strength_stays_near_the_picture(base: Base, photo: Image.Image) -> None:
    decoded = base.decode_image(base.encode_image(image_to_pixels(photo)[None]))

    def distance(strength: float) -> float:
        init = InitImage(image=photo, strength=strength)
        [image] = generate(base, "a cat", init_image=init, **{**OPTIONS, "steps": 50})
        return (image_to_pixels(image) - decoded[0]).abs().mean().item()

    assert distance(0.02) < 0.5 * distance(0.3) < 0.5 * distance(0.9)


def test_strength_one_forgets_the_picture(base: Base, photo: Image.Image) -> None:
    init = InitImage(image=photo, strength=1)
    [image] = generate(base, "a cat", init_image=init, **OPTIONS)
    assert difference(image, generate(base, "a cat", **OPTIONS)[0]) == 0


def test_only_the_last_steps_are_gone(base: Base, photo: Image.Image) -> None:
    calls = []
    hook = base.unet.register_forward_hook(lambda *_: calls.append(1))
    generate(base, "a cat", init_image=InitImage(image=photo, strength=0.3), **OPTIONS)
    hook.remove()
    assert len(calls) == 3


def test_each_image_is_the_same_in_any_batch(
    base: Base, photo: Image.Image, right_half: Image.Image
) -> None:
    init = InitImage(image=photo, strength=0.6, mask=right_half)
    together = generate(base, "", num_images=3, batch_size=3, init_image=init, **OPTIONS)
    apart = generate(base, "", num_images=3, batch_size=1, init_image=init, **OPTIONS)
    assert max(map(difference, together, apart)) <= 1


def test_an_image_prompt_acts_on_what_is_drawn_anew(
    base: Base,
    base_adapter: ImagePromptAdapter,
    pictures: list[Image.Image],
    right_half: Image.Image,
) -> None:
    init = InitImage(image=pictures[0], strength=0.8, mask=right_half)
    prompt = ImagePrompt(pictures[1], adapter=base_adapter, scale=2)
    [bare] = generate(base, "", init_image=init, **OPTIONS)
    [prompted] = generate(base, "", prompt, init_image=init, **OPTIONS)
    left = (0, 0, 16, 32)
    assert difference(bare, prompted) > 2
    assert difference(bare.crop(left), prompted.crop(left)) == 0


def test_the_middle_is_taken_and_never_stretched(base: Base, photo: Image.Image) -> None:
    wide = Image.new("RGB", (96, 64), "red")
    wide.paste(photo.resize((64, 64), Image.Resampling.NEAREST), (16, 0))
    mask = torch.zeros(64, 96)
    mask[:, 16:48] = 1
    start = start_of(InitImage(image=wide, mask=mask), base, None)
    assert start.picture.size == (32, 32)
    assert difference(start.picture.crop((4, 4, 28, 28)), photo.crop((4, 4, 28, 28))) < 80
    assert start.mask is not None and start.mask.shape[2:] == (8, 8)
    assert torch.equal(start.mask[0, 0, 4], torch.tensor([1.0] * 4 + [0.0] * 4))
    assert start_of(InitImage(image=wide), base, (32, 64)).picture.size == (64, 32)


def test_what_cannot_be_begun_from_is_refused(base: Base, photo: Image.Image) -> None:
    for strength in (0, 1.2, -1, float("nan")):
        with pytest.raises(ImpromptError, match="strength is"):
            InitImage(image=photo, strength=strength)
    with pytest.raises(ImpromptError, match="is no picture"):
        InitImage(image=np.zeros((8, 8)))
    init = InitImage(image=photo, mask=torch.ones(32, 64))
    with pytest.raises(ImpromptError, match="need the same shape"):
        generate(base, "", init_image=init, **OPTIONS)


def test_the_command_line_begins_from_a_picture(folder, tmp_path, photo, right_half, capsys):
    photo.save(tmp_path / "photo.png")
    right_half.save(tmp_path / "mask.png")
    command = ["generate", "a cat", "--base", folder, "--num-images", "1", "--steps", "4"]
    command += ["--init-image", tmp_path / "photo.png", "--init-mask", tmp_path / "mask.png"]
    command += ["--strength", "0.5", "--output", tmp_path / "out.png"]
    assert main([str(word) for word in command]) == 0
    with Image.open(tmp_path / "out.png") as image:
        left = (0, 0, 16, 32)
        assert difference(image.crop(left), photo.crop(left)) == 0
        assert "Denoising strength: 0.5" in image.info["parameters"]
