"""LoRA, textual inversion and DreamBooth trained elsewhere work on, also under an image prompt."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
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
