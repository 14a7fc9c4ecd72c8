"""Controls in generation: alone as diffusers does it, several at once, with image prompts."""

import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_base import write_tiny_base

from imprompt.adapters import create_adapter
from imprompt.bases import load_base
from imprompt.checkpoints import LoadedControl, load_control
from imprompt.checkpoints.identity import load_identity_net
from imprompt.cli.main import main
from imprompt.core.errors import ImpromptError
from imprompt.core.images import pixels_to_images
from imprompt.generation import Control, ImagePrompt, MapControl, generate, sample_latents
from imprompt.generation.controls import ControlRun, map_control
from imprompt.generation.sampler import initial_noise
from imprompt.systems.controlnet import create_controlnet
from imprompt.systems.t2i_adapter import create_t2i_adapter

SIZE = 32
OPTIONS = {"steps": 3, "progress": False, "seed": 3}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def base(base_folder):
    return load_base(base_folder)


@pytest.fixture(scope="module")
def controls(base):
    """A ControlNet and a T2I-Adapter that add something everywhere."""
    controlnet = create_controlnet(base, zero_entry=False).eval()
    with torch.no_grad():
        for layer in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            torch.nn.init.normal_(layer.weight, std=0.3)
        torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=3.0)
    return {
        "controlnet": LoadedControl(controlnet, "edges"),
        "t2i-adapter": LoadedControl(create_t2i_adapter(base).eval(), "depth"),
    }


@pytest.fixture(scope="module")
def pictures():
    noise = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return pixels_to_images(noise * 2 - 1)


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).max())


@pytest.mark.parametrize("name", ["controlnet", "of the whole picture", "t2i-adapter"])
def test_a_control_acts_as_in_diffusers(base, controls, pictures, name):
    model = controls.get(name, controls["controlnet"])
    module = model.module
    if name == "of the whole picture":  # as the published one for shuffled pictures
        model = module = deepcopy(module)
        module.register_to_config(global_pool_conditions=True)
    parts = {
        "vae": base.vae,
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        "unet": base.unet,
        "scheduler": base.scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if name != "t2i-adapter":
        pipeline = StableDiffusionControlNetPipeline(controlnet=module, **parts)
        weight = {"controlnet_conditioning_scale": 0.7}
    else:
        pipeline = StableDiffusionAdapterPipeline(adapter=module, **parts)
        weight = {"adapter_conditioning_scale": 0.7}
    pipeline.set_progress_bar_config(disable=True)
    control = Control(image=pictures[0], model=model, weight=0.7)
    bare = generate(base, "a cat", **OPTIONS)[0]
    own = generate(base, "a cat", controls=control, **OPTIONS)[0]
    stock = pipeline(
        "a cat",
        image=pictures[0],
        latents=initial_noise(3, [0], base.latent_shape()),
        num_inference_steps=3,
        **weight,
    ).images[0]
    assert difference(own, bare) > 8
    assert difference(own, stock) <= 1


def test_weight_zero_and_an_empty_span_are_the_bare_base(base, controls, pictures):
    bare = generate(base, "a cat", **OPTIONS)[0]
    for options in ({"weight": 0}, {"start": 0.5, "end": 0.5}):
        control = Control(image=pictures[0], model=controls["controlnet"], **options)
        assert difference(generate(base, "a cat", controls=[control], **OPTIONS)[0], bare) == 0


def test_a_span_is_kept(base, controls, pictures):
    calls = []
    module = controls["controlnet"].module
    hook = module.register_forward_hook(lambda *a: calls.append(1))
    control = Control(image=pictures[0], model=controls["controlnet"], start=0.3, end=0.9)
    generate(base, "a cat", controls=[control], **{**OPTIONS, "steps": 10})
    hook.remove()
    assert len(calls) == 6


def test_a_t2i_adapter_is_read_once(base, controls, pictures):
    calls = []
    hook = controls["t2i-adapter"].module.register_forward_hook(lambda *a: calls.append(1))
    control = Control(image=pictures[0], model=controls["t2i-adapter"])
    generate(base, "a cat", controls=[control], **OPTIONS)
    hook.remove()
    assert len(calls) == 1


def test_maps_that_are_bytes_or_grey_levels_are_refused(base, controls, pictures):
    levels = torch.from_numpy(np.array(pictures[0])).permute(2, 0, 1)
    for wrong, said in ((levels, "are torch.uint8"), (levels.float(), "from 0 to 255")):
        control = Control(image=[pictures[0], wrong], model=controls["controlnet"])
        with pytest.raises(ImpromptError, match=said):
            map_control(control, base, SIZE)
    control = Control(image=levels / 127.5 - 1, model=controls["controlnet"])
    torch.testing.assert_close(map_control(control, base, SIZE).maps[0], levels / 255)


def test_several_controls_add_up_with_their_weights(base, controls, pictures):
    both = [
        Control(image=pictures[0], model=controls["controlnet"], weight=0.5),
        Control(image=pictures[1], model=controls["t2i-adapter"], weight=0.8),
    ]
    together = generate(base, "a cat", controls=both, **OPTIONS)[0]
    for one in both:
        assert difference(generate(base, "a cat", controls=one, **OPTIONS)[0], together) > 2
    halves = [
        Control(image=pictures[0], model=controls["controlnet"], weight=w) for w in (0.2, 0.3)
    ]
    split = generate(base, "a cat", controls=[*halves, both[1]], **OPTIONS)[0]
    assert difference(split, together) <= 1


def test_each_image_may_have_its_map(base, controls, pictures):
    def draw(image, **options):
        control = Control(image=image, model=controls["controlnet"])
        return generate(base, "a cat", controls=control, **{**OPTIONS, **options})

    one_each = draw(pictures, num_images=3, batch_size=2)
    assert difference(one_each[1], draw(pictures[1], num_images=3)[1]) <= 1
    assert difference(one_each[1], draw(pictures[0], num_images=3)[1]) > 2
    with pytest.raises(ImpromptError, match="maps for 3 images, but 2 are generated"):
        draw(pictures, num_images=2)


def test_with_an_image_prompt_both_act(base, controls, pictures):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = create_adapter(base.unet, feature_dim=base.image_encoder.embed_dim)
    prompt = ImagePrompt(pictures[2], adapter=adapter)
    control = Control(image=pictures[0], model=controls["controlnet"])
    images = [
        generate(base, "", prompts, controls=some, **OPTIONS)[0]
        for prompts, some in (((), ()), (prompt, ()), ((), control), (prompt, control))
    ]
    for i in range(3):
        assert difference(images[i], images[3]) > 0
    assert not hasattr(base.unet, "imprompt_handle")


def test_tokens_may_stand_in_the_place_of_the_text(base, controls):
    module = controls["controlnet"].module
    maps = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    text = base.encode_text(["a cat"])
    nothing = base.encode_text([""])
    width = text.sequence.shape[-1]
    tokens = torch.randn(1, 5, width, generator=torch.Generator().manual_seed(2))

    def draw(**given):
        control = MapControl(module=module, maps=maps, **given)
        return sample_latents(base, text, nothing, steps=2, controls=[control])

    plain = draw()
    as_text = draw(tokens=text.sequence, zero_tokens=nothing.sequence)
    torch.testing.assert_close(as_text, plain)
    assert not torch.allclose(draw(tokens=tokens, zero_tokens=0 * tokens), plain, atol=1e-3)


def test_a_t2i_adapter_may_read_grey(base, controls, pictures):
    config = controls["t2i-adapter"].module.config
    names = ("channels", "num_res_blocks", "downscale_factor", "adapter_type")
    grey = T2IAdapter(in_channels=1, **{name: config[name] for name in names})
    images = [
        generate(base, "a cat", controls=Control(image=image, model=grey), **OPTIONS)[0]
        for image in (pictures[0], pictures[0].convert("L"), pictures[1])
    ]
    assert difference(images[0], images[2]) > 2


def test_a_control_of_another_base_is_refused(base, controls, tmp_path):
    wide = ControlNetModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(8, 8, 8),
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=2,
        layers_per_block=1,
    )
    control = Control(image=Image.new("RGB", (8, 8)), model=LoadedControl(wide))
    with pytest.raises(ImpromptError, match="another base"):
        generate(base, "", controls=control, **OPTIONS)
    with pytest.raises(ImpromptError, match="no time span"):
        Control(image="a.png", model=controls["controlnet"], start=0.9, end=0.1)
    with pytest.raises(ImpromptError, match="weight is nan"):
        Control(image="a.png", model=controls["controlnet"], weight=float("nan"))
    base.vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ImpromptError, match="AutoencoderKL"):
        load_control(tmp_path / "vae")


def test_a_bare_network_is_a_control(base, controls, pictures):
    for loaded in controls.values():
        images = [
            generate(base, "a cat", controls=Control(image=pictures[0], model=model), **OPTIONS)[0]
            for model in (loaded, loaded.module)
        ]
        assert difference(*images) == 0
    with pytest.raises(ImpromptError, match="UNet2DConditionModel; needed is"):
        Control(image=pictures[0], model=base.unet)


def test_a_mask_says_where_a_control_acts(base, controls, pictures):
    mask = torch.zeros(SIZE, SIZE)
    mask[:, : SIZE // 2] = 1

    def added(model, **options):
        control = map_control(Control(image=pictures[0], model=model, **options), base, None)
        text = base.encode_text(["a cat"])
        run = ControlRun([control], base, ["conditional"], slice(0, 1), 1, 3, text)
        noisy = torch.ones(1, *base.latent_shape())
        return run.residuals(noisy, torch.tensor(5), 0)

    for model in controls.values():
        with torch.no_grad():
            whole, half = added(model), added(model, mask=mask)
        first, masked = (of.skips or of.encoder for of in (whole, half))
        for one, other in zip(first, masked, strict=True):
            width = one.shape[-1] // 2
            assert torch.equal(one[..., :width], other[..., :width])
            assert other[..., width:].abs().max() == 0 < one[..., width:].abs().max()
    with pytest.raises(ImpromptError, match="aspect ratio"):
        control = Control(image=pictures[0], model=model, mask=mask[:, : SIZE // 2])
        generate(base, "a cat", controls=control, **OPTIONS)


def test_a_network_of_the_caller_s_stays_as_it_is(base_folder, controls, pictures):
    half = load_base(base_folder, dtype=torch.bfloat16)
    module = deepcopy(controls["controlnet"].module).requires_grad_(True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    generate(half, "a cat", controls=Control(image=pictures[0], model=module), **OPTIONS)
    for name, value in module.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])
    loaded = LoadedControl(module, "edges")  # one that was read by us is moved for good
    generate(half, "a cat", controls=Control(image=pictures[0], model=loaded), **OPTIONS)
    assert module.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"adapter_type": "full_adapter_xl", "channels": [8, 16, 16]}, "its type is"),
        ({"downscale_factor": 8}, "its downscaling is 8"),
        ({"channels": [8, 24]}, "its channels is"),
        ({"channels": [8, 16, 16]}, "its channels is"),
    ],
)
def test_a_t2i_adapter_of_another_family_is_refused(base, controls, change, reason):
    config = dict(controls["t2i-adapter"].module.config)
    shape = {k: config[k] for k in ("adapter_type", "downscale_factor", "channels", "in_channels")}
    other = T2IAdapter(num_res_blocks=1, **{**shape, **change})
    with pytest.raises(ImpromptError, match=reason):
        generate(base, "", controls=Control(image=Image.new("RGB", (8, 8)), model=other))


def light_adapter(channels):
    torch.manual_seed(1)
    return T2IAdapter(
        channels=channels, num_res_blocks=1, downscale_factor=4, adapter_type="light_adapter"
    )


def test_a_light_t2i_adapter_lists_a_block_less(base_folder, pictures, tmp_path):
    """As the published one for colours does: 320, 640, 1280 for a UNet of 320, 640, 1280, 1280."""
    folder = tmp_path / "base"
    shutil.copytree(base_folder, folder)
    config = {**load_base(base_folder).unet.config, "block_out_channels": (8, 8)}
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    base = load_base(folder)
    light = light_adapter([8])
    assert [feature.shape[1] for feature in light(torch.zeros(1, 3, SIZE, SIZE))] == [8, 8]
    bare, drawn = (
        generate(base, "a cat", controls=controls, **OPTIONS)[0]
        for controls in ((), Control(image=pictures[0], model=light, weight=20.0))
    )
    assert difference(bare, drawn) > 0
    with pytest.raises(ImpromptError, match="its channels is"):
        generate(base, "", controls=Control(image=pictures[0], model=light_adapter([8, 8])))


@pytest.mark.parametrize("name", ["controlnet", "t2i-adapter"])
def test_a_folder_with_holes_is_refused(controls, name, tmp_path):
    controls[name].module.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    gone = sorted(weights)[:2]
    save_file({key: value for key, value in weights.items() if key not in gone}, file)
    with pytest.raises(ImpromptError, match=f"lacks 2 tensors, '{gone[0]}' the first"):
        load_control(tmp_path)
    if name == "controlnet":
        with pytest.raises(ImpromptError, match="lacks 2 tensors"):
            load_identity_net(tmp_path)


@pytest.mark.parametrize("name", ["controlnet", "t2i-adapter"])
def test_a_folder_of_half_precision_is_read(controls, name, tmp_path):
    controls[name].module.save_pretrained(tmp_path, variant="fp16")
    assert [file.name for file in tmp_path.glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    loaded = load_control(tmp_path).module
    for key, value in controls[name].module.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value)


def test_the_command_line(base_folder, controls, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, control in controls.items():
        control.module.save_pretrained(tmp_path / name)
    pictures[0].save("map.png")
    command = ["generate", "a cat", "--base", str(base_folder), "--steps", "2", "--num-images", "1"]
    models = ["--control-model", "edges=controlnet", "--control-model", "depth=t2i-adapter"]
    both = ["--control", "edges=map.png:0.5", "--control", "depth=map.png"]
    assert main([*command, *both, *models]) == 0
    assert Image.open("images.png").size == (SIZE, SIZE)
    masked = ["--control-mask", "map.png", "--output", "masked.png"]
    assert main([*command, *both, *models, *masked]) == 0
    assert difference(Image.open("images.png"), Image.open("masked.png")) > 0
    for options, message in (
        (["--control-mask", "map.png"], "--control-mask is about controls, but no --control"),
        (["--control", "edges=map.png"], "no control for edges"),
        (["--control", "map.png"], "KIND=FILE"),
        (["--control", "edges=none.png", *models[:2]], "no image file none.png"),
        (models[:2], "no --control edges=FILE"),
    ):
        assert main([*command, "--output", "other.png", *options]) == 2
        assert message in capsys.readouterr().err
