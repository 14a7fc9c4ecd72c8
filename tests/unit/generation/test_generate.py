"""`generate` from outside: what it must equal, what must not matter, what it refuses."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from tiny_base import IMAGE_SIZE_PX, write_tiny_base, write_tiny_xl_base

from imprompt.adapters import ImagePromptAdapter, create_adapter
from imprompt.bases import Base, load_base
from imprompt.core.errors import ImpromptError
from imprompt.diffusion.samplers import SAMPLERS
from imprompt.generation import ImagePrompt, generate, initial_noise
from imprompt.generation.pipeline import _check_seed


def draw(base: Base, prompt: str | list[str] = "red cat", *prompts: ImagePrompt, **options: Any):
    """Images as one array of integers, few steps, no progress bar."""
    options = {"steps": 3, "progress": False, **options}
    images = generate(base, prompt, prompts, **options)
    return numpy.stack([numpy.asarray(image).astype(int) for image in images])


def difference(a: numpy.ndarray, b: numpy.ndarray) -> int:
    assert a.shape == b.shape
    return int(abs(a - b).max())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_a_stock_pipeline_draws_the_same(
    tmp_path: Path, prediction_type: str, guidance_scale: float
) -> None:
    from diffusers import StableDiffusionPipeline

    folder = write_tiny_base(tmp_path / "tiny", prediction_type=prediction_type)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    base = load_base(folder)
    theirs = pipeline(
        ["a red cat", "cat"],
        negative_prompt=["red", "red"],
        num_inference_steps=10,
        guidance_scale=guidance_scale,
        latents=initial_noise(3, [0, 1], base.latent_shape()),
        output_type="np",
    ).images
    ours = draw(
        base,
        ["a red cat", "cat"],
        negative_prompt="red",
        steps=10,
        guidance_scale=guidance_scale,
        seed=3,
    )
    assert abs(ours - theirs * 255).max() <= 1
    assert ours.std() > 10


def test_what_is_too_long_to_be_read_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for base in (
        load_base(write_tiny_base(tmp_path / "sd")),
        load_base(write_tiny_xl_base(tmp_path / "xl")),
    ):
        read = "red " * 9 + f"{base.name[0]}"  # ten tokens, two marks
        capsys.readouterr()
        for _ in range(2):
            draw(base, [f"{read} cat, cat", read], steps=1, negative_prompt=f"{read} red")
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 2 and all(line.startswith("imprompt: ") for line in told)
        assert "'cat , cat'" in told[0] and "'red'" in told[1]


def test_weight_zero_is_the_bare_base_to_the_bit(
    base: Base, adapter: ImagePromptAdapter, pictures: list[Image.Image]
) -> None:
    bare = draw(base)
    for nothing in (
        ImagePrompt(pictures[0], adapter=adapter, scale=0),
        ImagePrompt(pictures[0], adapter=adapter, scale=[0.0] * len(cross_sites(base))),
        ImagePrompt(pictures[0], adapter=adapter, start=0.5, end=0.5),
    ):
        assert difference(draw(base, "red cat", nothing), bare) == 0
    handle = adapter.install(base.unet)
    assert difference(draw(base), bare) == 0
    handle.remove()


def cross_sites(base: Base) -> list[str]:
    return [name for name in base.unet.attn_processors if "attn2" in name]


def test_image_prompts_act_and_more_weight_acts_more(
    base: Base, adapter: ImagePromptAdapter, pictures: list[Image.Image]
) -> None:
    bare = draw(base)
    changes = [
        abs(draw(base, "red cat", ImagePrompt(pictures[0], adapter=adapter, scale=scale)) - bare)
        for scale in (0.1, 1, 4)
    ]
    assert 0 < changes[0].mean() < changes[1].mean() < changes[2].mean()


def test_the_empty_text_is_enough(
    base: Base, base_adapter: ImagePromptAdapter, pictures: list[Image.Image]
) -> None:
    one, other = (
        draw(base, "", ImagePrompt(picture, adapter=base_adapter)) for picture in pictures[:2]
    )
    assert difference(one, other) > 0
    again = generate(base, image_prompts=ImagePrompt(pictures[0], adapter=base_adapter), steps=3)
    assert difference(numpy.asarray(again[0])[None].astype(int), one) == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_depends_on_its_seed_and_index_alone(
    base: Base, base_adapter: ImagePromptAdapter, pictures: list[Image.Image], sampler: str
) -> None:
    prompt = ImagePrompt(pictures[0], adapter=base_adapter, mask=pictures[1])
    options = {"sampler": sampler, "seed": 7}
    five = draw(base, "red cat", prompt, num_images=5, **options)
    # Batches of other sizes sum in another order: the last bit may round the other way.
    for batch_size in (1, 2):
        batched = draw(base, "red cat", prompt, num_images=5, batch_size=batch_size, **options)
        assert difference(batched, five) <= 1
    assert difference(draw(base, "red cat", prompt, num_images=2, **options), five[:2]) <= 1
    assert difference(five[:1], five[1:2]) > 1
    assert difference(draw(base, "red cat", prompt, sampler=sampler, seed=8), five[:1]) > 1


def test_one_prompt_for_each_image(base: Base) -> None:
    together = draw(base, ["red cat", "a", "red cat"], negative_prompt=["", "red", ""])
    alone = draw(base, "red cat")
    assert difference(together[:1], alone) <= 1
    assert difference(together[2:], together[:1]) > 1  # same texts, other noise


def test_without_guidance_only_half_is_computed(
    base: Base, base_adapter: ImagePromptAdapter, pictures: list[Image.Image]
) -> None:
    batches: list[int] = []
    hook = base.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    prompt = ImagePrompt(pictures[0], adapter=base_adapter)
    try:
        draw(base, "red cat", prompt, guidance_scale=1)
        assert batches == [1, 1, 1]
        batches.clear()
        draw(base, "red cat", prompt, guidance_scale=2)
        assert batches == [2, 2, 2]
        batches.clear()
        draw(base, "red cat", prompt, guidance_scale=2, image_guidance_scale=3)
        assert batches == [3, 3, 3]
    finally:
        hook.remove()


def test_image_guidance_of_the_same_strength_is_joint_guidance(
    base: Base, base_adapter: ImagePromptAdapter, pictures: list[Image.Image]
) -> None:
    prompt = ImagePrompt(pictures[0], adapter=base_adapter)
    joint = draw(base, "red cat", prompt)
    assert difference(draw(base, "red cat", prompt, image_guidance_scale=7.5), joint) == 0
    assert difference(draw(base, "red cat", prompt, image_guidance_scale=7.501), joint) <= 1
    assert difference(draw(base, "red cat", prompt, image_guidance_scale=1), joint) > 1


def test_tokens_and_keys_are_computed_once(
    base: Base, adapter: ImagePromptAdapter, pictures: list[Image.Image]
) -> None:
    calls: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        for name, module in adapter.named_modules()
        if name == "image_proj" or name.endswith("to_k_ip")
    ]
    draw(base, "red cat", ImagePrompt(pictures[0], adapter=adapter), num_images=2, steps=9)
    for hook in hooks:
        hook.remove()
    assert calls.count("image_proj") == 2  # of the image, and of no image
    assert len(calls) == 2 + len(cross_sites(base))


def test_time_spans(
    base: Base, base_adapter: ImagePromptAdapter, pictures: list[Image.Image]
) -> None:
    def prompt(**options: Any) -> ImagePrompt:
        return ImagePrompt(pictures[0], adapter=base_adapter, **options)

    always = draw(base, "", prompt(), steps=4)
    two_halves = draw(base, "", prompt(end=0.5), prompt(start=0.5), steps=4)
    assert difference(two_halves, always) == 0
    early, late = (
        draw(base, "", prompt(end=0.5), steps=4),
        draw(base, "", prompt(start=0.5), steps=4),
    )
    assert len({array.tobytes() for array in (always, early, late, draw(base, "", steps=4))}) == 4


def test_masks_add_up(
    base: Base,
    base_adapter: ImagePromptAdapter,
    pictures: list[Image.Image],
    left_half: torch.Tensor,
) -> None:
    def prompt(mask: Any) -> ImagePrompt:
        return ImagePrompt(pictures[0], adapter=base_adapter, mask=mask)

    everywhere = draw(base, "", ImagePrompt(pictures[0], adapter=base_adapter))
    assert difference(draw(base, "", prompt(Image.new("L", (32, 32), 255))), everywhere) == 0
    both_halves = draw(base, "", prompt(left_half), prompt(1 - left_half))
    assert difference(both_halves, everywhere) <= 1
    assert difference(draw(base, "", prompt(left_half)), everywhere) > 1


def test_several_prompts_and_adapters_compose_in_any_order(
    base: Base,
    adapter: ImagePromptAdapter,
    base_adapter: ImagePromptAdapter,
    pictures: list[Image.Image],
) -> None:
    one = ImagePrompt(pictures[0], adapter=adapter, scale=0.7)
    other = ImagePrompt(pictures[1:], adapter=base_adapter, scale={"up": 0.5, "down": 0})
    forward, backward = draw(base, "cat", one, other), draw(base, "cat", other, one)
    assert difference(forward, backward) <= 1
    assert difference(forward, draw(base, "cat", one)) > 0


def test_images_may_be_files_and_pixels(
    base: Base, base_adapter: ImagePromptAdapter, pictures: list[Image.Image], tmp_path: Path
) -> None:
    pictures[0].save(tmp_path / "picture.png")
    pixels = torch.from_numpy(numpy.array(pictures[0])).permute(2, 0, 1) / 127.5 - 1
    images = (pictures[0], tmp_path / "picture.png", str(tmp_path / "picture.png"), pixels)
    drawn = [draw(base, "", ImagePrompt(image, adapter=base_adapter)) for image in images]
    assert all(difference(other, drawn[0]) <= 1 for other in drawn[1:])


@pytest.mark.parametrize("already_installed", [False, True])
def test_the_model_is_left_as_it_was(
    base: Base,
    base_adapter: ImagePromptAdapter,
    pictures: list[Image.Image],
    already_installed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handle = base_adapter.install(base.unet) if already_installed else None
    before = dict(base.unet.attn_processors)
    prompt = ImagePrompt(pictures[0], adapter=base_adapter)
    draw(base, "", prompt)
    assert base.unet.attn_processors == before

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="in the middle"):
        patch.setattr(type(base), "denoise", fail)
        draw(base, "", prompt)
    assert base.unet.attn_processors == before
    if handle is not None:
        handle.remove()


def test_other_sizes_than_the_usual(base: Base) -> None:
    assert draw(base, size_px=48).shape == (1, 48, 48, 3)
    assert draw(base, size_px=(24, 64)).shape == (1, 24, 64, 3)


def test_half_precision_draws_nearly_the_same(
    base: Base, folder: Path, base_adapter: ImagePromptAdapter, pictures: list[Image.Image]
) -> None:
    prompt = ImagePrompt(pictures[0], adapter=base_adapter)
    in_half = draw(load_base(folder, dtype=torch.bfloat16), "red cat", prompt, guidance_scale=2)
    in_full = draw(base, "red cat", prompt, guidance_scale=2)
    assert abs(in_half - in_full).mean() < 5


def test_mistakes_are_named(
    base: Base, base_adapter: ImagePromptAdapter, pictures: list[Image.Image], tmp_path: Path
) -> None:
    def prompt(**options: Any) -> ImagePrompt:
        return ImagePrompt(pictures[0], adapter=base_adapter, **options)

    for options, message in (
        ({"sampler": "dim"}, "no sampler 'dim'"),
        ({"steps": 0}, "allowed are 1 to 1000"),
        ({"size_px": 30}, "multiples of 4 px"),
        ({"num_images": 0}, "num_images is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts were given for 1 images"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan: a finite number"),
        ({"image_guidance_scale": float("inf")}, "image_guidance_scale is inf"),
        ({"guidance_rescale": float("nan")}, "guidance_rescale is nan"),
    ):
        with pytest.raises(ImpromptError, match=message):
            draw(base, "cat", **options)
    with pytest.raises(ImpromptError, match="2 prompts were given with num_images=3"):
        draw(base, ["cat", "red"], num_images=3)
    with pytest.raises(ImpromptError, match="empty list of prompts"):
        draw(base, [])
    with pytest.raises(ImpromptError, match="no time span"):
        prompt(start=0.6, end=0.5)
    _check_seed(numpy.int64(3))
    with pytest.raises(ImpromptError, match=r"seed is \[1, 2\], but must be one whole number"):
        _check_seed([1, 2])
    for name in ("scale", "lora_scale", "shortcut_scale"):
        with pytest.raises(ImpromptError, match=f"{name} is nan: a finite number"):
            prompt(**{name: float("nan")})
    with pytest.raises(ImpromptError, match="without an image"):
        ImagePrompt([], adapter=base_adapter)
    with pytest.raises(ImpromptError, match="scale has 3 numbers"):
        draw(base, "", prompt(scale=[1.0, 1.0, 0.5]))
    with pytest.raises(ImpromptError, match="mask"):
        draw(base, "", prompt(mask=torch.zeros(2, 2, 2)))
    with pytest.raises(ImpromptError, match="aspect ratio"):
        draw(base, "", prompt(mask=torch.ones(8, 64)))
    with pytest.raises(ImpromptError, match=r"missing\.png"):
        draw(base, "", ImagePrompt(tmp_path / "missing.png", adapter=base_adapter))
    with pytest.raises(ImpromptError, match=r"pixels are \(3, height, width\)"):
        draw(base, "", ImagePrompt(torch.zeros(1, 8, 8), adapter=base_adapter))


def test_an_encoder_that_does_not_fit_is_told(
    base: Base, pictures: list[Image.Image], tmp_path: Path
) -> None:
    wide = create_adapter(base.unet, "base", feature_dim=77)
    with pytest.raises(ImpromptError, match="image_embeds of 77 numbers, but .* gives 20"):
        draw(base, "", ImagePrompt(pictures[0], adapter=wide))
    bare = load_base(write_tiny_base(tmp_path / "bare", image_encoder=False))
    narrow = create_adapter(bare.unet, "base", feature_dim=20)
    prompt = ImagePrompt(pictures[0], adapter=narrow)
    with pytest.raises(ImpromptError, match="brings no image encoder"):
        draw(bare, "", prompt)
    assert draw(bare, "", prompt, image_encoder=base.image_encoder).shape == (
        1,
        IMAGE_SIZE_PX,
        IMAGE_SIZE_PX,
        3,
    )
    face = create_adapter(base.unet, "faceid", feature_dim=20)
    with pytest.raises(ImpromptError, match="[Ff]ace"):
        draw(base, "", ImagePrompt(pictures[0], adapter=face))
