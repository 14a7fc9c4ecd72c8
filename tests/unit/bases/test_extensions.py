"""LoRA, textual inversion and DreamBooth trained elsewhere work on, also under an image prompt."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_base import TEXT_DIM, write_tiny_base

from imprompt.adapters import create_adapter
from imprompt.bases import load_base
from imprompt.bases.extensions import add_lora, add_textual_inversion
from imprompt.cli.main import main
from imprompt.core.errors import ImpromptError
from imprompt.generation import ImagePrompt, generate

OPTIONS = {"steps": 2, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def base(folder):
    return load_base(folder)


@pytest.fixture(scope="module")
def lora_file(folder, tmp_path_factory):
    """As diffusers' training scripts save what PEFT trained."""
    unet = load_base(folder).unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    file = tmp_path_factory.mktemp("lora") / "pytorch_lora_weights.safetensors"
    StableDiffusionPipeline.save_lora_weights(file.parent, unet_lora_layers=weights)
    return file


def prompt_of(base, colour=(255, 0, 0)):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = create_adapter(base.unet, feature_dim=base.image_encoder.embed_dim)
        with torch.no_grad():
            for weight in adapter.parameters():
                weight.mul_(3)
    return ImagePrompt(Image.new("RGB", (32, 32), colour), adapter=adapter)


def draw(base, *prompts, text="a cat"):
    return np.asarray(generate(base, text, prompts, **OPTIONS)[0], dtype=float)


def differ(a, b):
    return float(np.abs(a - b).max())


def test_a_lora_works_on_under_an_image_prompt(base, lora_file):
    prompt = prompt_of(base)
    plain, prompted = draw(base), draw(base, prompt)
    add_lora(base, lora_file, 0.8)
    with_lora, both = draw(base), draw(base, prompt)
    assert differ(with_lora, plain) > 1 and differ(both, prompted) > 1
    assert differ(both, with_lora) > 0
    assert differ(draw(base), with_lora) == 0  # the adapter left, the LoRA stayed
    base.unet.set_adapters("lora", 0.0)
    assert differ(draw(base), plain) <= 1 and differ(draw(base, prompt), prompted) <= 1


def test_the_weight_is_kept_beside_a_second_lora(base, lora_file):
    add_lora(base, lora_file, 0.3)
    alone = draw(base)
    add_lora(base, lora_file, 0.0, name="other")
    assert differ(draw(base), alone) <= 1
    twice = load_base(base_folder_of(lora_file, base))
    add_lora(twice, lora_file, 0.1)
    add_lora(twice, lora_file, 0.2, name="other")
    assert differ(draw(twice), alone) <= 1


def base_folder_of(lora_file, base):
    return write_tiny_base(lora_file.parent / "again")


def write_text_encoder_lora(folder, path, seed):
    """A LoRA that trained the text encoder alone."""
    text_encoder = load_base(folder).text_encoder
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder.add_adapter(config)
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(text_encoder))
    StableDiffusionPipeline.save_lora_weights(path, text_encoder_lora_layers=weights)
    return path / "pytorch_lora_weights.safetensors"


def test_the_weight_counts_in_the_text_encoder(base, folder, lora_file, tmp_path):
    def states():
        return base.encode_text(["red cat"]).sequence

    plain = states()
    files = [write_text_encoder_lora(folder, tmp_path / str(seed), seed) for seed in (1, 2)]
    add_lora(base, files[0], 0.0, name="first")
    torch.testing.assert_close(states(), plain)
    add_lora(base, files[0], 1.0, name="again")
    alone = states()
    assert not torch.allclose(alone, plain, atol=1e-4)
    add_lora(base, lora_file, 0.5, name="of the UNet")
    torch.testing.assert_close(states(), alone)  # the text encoder's stays on
    add_lora(base, files[1], 1.0, name="second")
    assert not torch.allclose(states(), alone, atol=1e-4)
    assert not any(p.requires_grad for part in base.parts().values() for p in part.parameters())


def unet_output(unet):
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(1, 4, 8, 8, generator=generator), torch.ones(1, 4, TEXT_DIM)
    with torch.no_grad():
        return unet(latents, torch.tensor([7]), text).sample


def trained_by_peft(unet, **options):
    """A LoRA that counts four times as much as one whose alpha nobody knows would."""
    layers = ["to_q", "to_v", "to_out.0"]
    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=layers, init_lora_weights=False, **options
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return get_peft_model(unet, config)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_v": 1}}])
@pytest.mark.parametrize("is_folder", [True, False])
def test_what_peft_saved_acts_as_it_does_in_peft(base, folder, tmp_path, options, is_folder):
    model = trained_by_peft(load_base(folder).unet, **options)
    model.save_pretrained(tmp_path)
    plain = unet_output(base.unet)
    add_lora(base, tmp_path if is_folder else tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(unet_output(base.unet), unet_output(model))
    assert not torch.allclose(unet_output(base.unet), plain, atol=1e-3)
    add_lora(base, tmp_path, 0.0, name="again")
    torch.testing.assert_close(unet_output(base.unet), unet_output(model))


def test_what_peft_saved_is_nothing_without_its_settings(base, folder, tmp_path):
    trained_by_peft(load_base(folder).unet).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ImpromptError, match="adapter_config.json is not beside it"):
        add_lora(base, tmp_path)


def test_what_a_unet_saved_acts_as_it_did(base, folder, tmp_path):
    unet = trained_by_peft(load_base(folder).unet).get_base_model()
    unet._hf_peft_config_loaded = True  # as after unet.add_adapter, for which it asks
    unet.save_lora_adapter(tmp_path)
    add_lora(base, tmp_path)
    torch.testing.assert_close(unet_output(base.unet), unet_output(unet))


def test_the_names_of_the_first_scripts_are_known(base, folder, lora_file, tmp_path):
    weights = {
        key.removeprefix("unet.")
        .replace(".to_out.0.lora.", ".processor.to_out_lora.")
        .replace(".to_q.lora.", ".processor.to_q_lora."): value
        for key, value in load_file(lora_file).items()
    }
    assert any(".processor.to_q_lora.down." in key for key in weights)
    save_file(weights, tmp_path / "first.safetensors")
    add_lora(base, tmp_path / "first.safetensors")
    other = load_base(folder)
    add_lora(other, lora_file)
    torch.testing.assert_close(unet_output(base.unet), unet_output(other.unet))


@pytest.mark.parametrize(
    "layer", ["transformer.single_transformer_blocks.0.attn.to_q", "text_encoder_2.layers.0.q_proj"]
)
def test_a_lora_that_matches_nothing_is_refused_and_leaves_nothing(
    base, lora_file, tmp_path, layer
):
    sides = {"lora_A": torch.ones(2, 8), "lora_B": torch.ones(8, 2)}
    file = tmp_path / "foreign.safetensors"
    save_file({f"{layer}.{side}.weight": value for side, value in sides.items()}, file)
    plain = unet_output(base.unet)
    with pytest.raises(ImpromptError, match="does not go on tiny: "):
        add_lora(base, file)
    torch.testing.assert_close(unet_output(base.unet), plain)
    add_lora(base, lora_file, 0.4)
    with_lora = unet_output(base.unet)
    with pytest.raises(ImpromptError, match="does not go on tiny: "):
        add_lora(base, file, name="foreign")
    with pytest.raises(ImpromptError, match="has a LoRA 'lora' already"):
        add_lora(base, file)
    torch.testing.assert_close(unet_output(base.unet), with_lora)
    assert base.unet.imprompt_lora_weights == {"lora": 0.4}


def test_a_textual_inversion_works_on_under_an_image_prompt(base, tmp_path):
    before, prompt = draw(base, text="red"), prompt_of(base)
    vector = 3 * torch.randn(TEXT_DIM, generator=torch.Generator().manual_seed(0))
    save_file({"<thing>": vector}, tmp_path / "thing.safetensors")
    add_textual_inversion(base, tmp_path / "thing.safetensors")
    assert differ(draw(base, text="red"), before) == 0
    named = draw(base, text="red <thing>")
    assert differ(named, before) > 0
    assert differ(draw(base, prompt, text="red <thing>"), draw(base, prompt, text="red")) > 0


def test_an_adapter_goes_on_a_base_that_was_trained_further(folder, tmp_path):
    """DreamBooth's result is another UNet of the same shape."""
    base = load_base(folder)
    prompt = prompt_of(base)
    tuned = load_base(folder)
    with torch.no_grad():
        for weight in tuned.unet.parameters():
            weight.add_(
                0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            )
    StableDiffusionPipeline(
        **{n: getattr(tuned, n) for n in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")},
        safety_checker=None,
        feature_extractor=None,
        image_encoder=tuned.image_encoder.model,
    ).save_pretrained(tmp_path / "dreambooth")
    dreambooth = load_base(tmp_path / "dreambooth")
    assert differ(draw(dreambooth), draw(base)) > 1
    assert differ(draw(dreambooth, prompt), draw(dreambooth)) > 0


def test_the_command_line(folder, lora_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"<thing>": torch.ones(TEXT_DIM)}, tmp_path / "thing.safetensors")
    command = [
        "generate",
        "red <thing>",
        "--base",
        str(folder),
        "--steps",
        "2",
        "--num-images",
        "1",
    ]
    assert main([*command, "--output", "bare.png"]) == 0
    more = ["--lora", f"{lora_file}:0.8", "--textual-inversion", "thing.safetensors"]
    assert main([*command, *more, "--output", "with.png"]) == 0
    images = [np.asarray(Image.open(name), dtype=float) for name in ("bare.png", "with.png")]
    assert differ(*images) > 1
    assert main([*command, "--lora", "none.safetensors", "--output", "other.png"]) == 2


def test_what_does_not_fit_is_told(base, tmp_path):
    with pytest.raises(ImpromptError, match="does not go on tiny"):
        add_lora(base, tmp_path / "none.safetensors")
    save_file({"<thing>": torch.zeros(TEXT_DIM + 1)}, tmp_path / "wide.safetensors")
    with pytest.raises(ImpromptError, match="does not go on tiny"):
        add_textual_inversion(base, tmp_path / "wide.safetensors")


def test_a_file_that_is_missing_or_no_lora_is_told_so(base, tmp_path):
    for source in ("nowhere.safetensors", tmp_path / "nowhere"):
        with pytest.raises(ImpromptError, match="there is no such file or folder as .*nowhere"):
            add_lora(base, source)
    save_file({"features.weight": torch.ones(2)}, tmp_path / "judge.safetensors")
    with pytest.raises(ImpromptError, match="holds no LoRA, but tensors such as 'features.weight'"):
        add_lora(base, tmp_path / "judge.safetensors")
