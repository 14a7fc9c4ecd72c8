"""Loading bases: every form that is allowed, and a clear word on everything else."""

import json
import shutil
import socket
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_base import IMAGE_SIZE_PX, LATENT_CHANNELS, TEXT_DIM, TEXT_LENGTH, write_tiny_base
from transformers import CLIPTextModel

from imprompt.bases import load_base
from imprompt.bases.diorama import diorama_folder
from imprompt.core.errors import ImpromptError
from imprompt.generation import generate, initial_noise


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_folder_is_read_without_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a local folder was looked up in the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    base = load_base(folder)
    assert base.name == "tiny"
    assert base.image_size_px == IMAGE_SIZE_PX
    assert base.latent_shape() == (LATENT_CHANNELS, 8, 8)
    assert base.latent_shape((64, 32)) == (LATENT_CHANNELS, 16, 8)
    assert base.scheduler.config.prediction_type == "epsilon"
    assert base.image_encoder is not None
    assert set(base.parts()) == {"unet", "vae", "text_encoder", "image_encoder"}


def test_all_parts_are_frozen_and_in_evaluation_mode(folder: Path) -> None:
    for part in load_base(str(folder)).parts().values():
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())


def test_texts_become_states(folder: Path) -> None:
    base = load_base(folder)
    ids = base.tokenize(["red cat", "", "red " * 50])
    assert ids.shape == (3, TEXT_LENGTH) and ids.dtype == torch.int64
    states = base.encode_text(["red cat", "", "red " * 50])
    assert states.sequence.shape == (3, TEXT_LENGTH, TEXT_DIM)
    assert states.pooled is None and states.framing is None
    assert torch.equal(states.sequence, base.encode_text(ids).sequence)
    assert torch.equal(states[[1]].sequence, base.encode_text([None]).sequence)


def test_another_layer_of_the_text_encoder_may_be_read(folder: Path, tmp_path: Path) -> None:
    base, skipping = load_base(folder), load_base(folder, clip_skip=2)
    shorter = CLIPTextModel.from_pretrained(folder / "text_encoder", num_hidden_layers=1)
    texts = ["red cat", "", "red " * 50]
    states = skipping.encode_text(texts).sequence
    assert torch.equal(states, shorter(base.tokenize(texts)).last_hidden_state)
    assert skipping.fingerprint() != base.fingerprint()
    assert skipping.encoders_fingerprint() == base.encoders_fingerprint()
    for missing in (0, 3):
        with pytest.raises(ImpromptError, match="has layers 1 to 2, counted from the last"):
            load_base(folder, clip_skip=missing)


def test_a_configuration_is_for_single_files(folder: Path) -> None:
    with pytest.raises(ImpromptError, match=r"for a single \.safetensors file"):
        load_base(folder, config=folder)


def test_what_is_predicted_may_be_said(folder: Path) -> None:
    said = load_base(folder, prediction_type="v_prediction").scheduler.config
    assert said.prediction_type == "v_prediction"
    others = dict(load_base(folder).scheduler.config)
    assert {**said, "prediction_type": others["prediction_type"]} == others
    with pytest.raises(ImpromptError, match="use one of epsilon, v_prediction, sample"):
        load_base(folder, prediction_type="v")


def test_a_model_distilled_with_its_guidance_is_refused(copy: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(copy / "unet")
    config = {**unet.config, "time_cond_proj_dim": 16}
    UNet2DConditionModel.from_config(config).save_pretrained(copy / "unet")
    with pytest.raises(ImpromptError, match='LCM-LoRA and the sampler "lcm"'):
        load_base(copy)


def test_images_become_latents_and_pixels_again(folder: Path) -> None:
    base = load_base(folder)
    pixels = torch.rand(2, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX) * 2 - 1
    mean, standard_deviation = base.latent_distribution(pixels)
    noise = torch.randn(2, *base.latent_shape())
    assert torch.equal(base.encode_image(pixels), mean)
    assert torch.equal(base.encode_image(pixels, noise), mean + standard_deviation * noise)
    posterior = base.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, posterior.mean * base.vae.config.scaling_factor)
    assert base.decode_image(mean).shape == pixels.shape


def test_the_denoiser_lets_gradients_through(folder: Path) -> None:
    base = load_base(folder)
    states = base.encode_text(["red cat"])
    states.sequence.requires_grad_()
    output = base.denoise(torch.randn(1, *base.latent_shape()), torch.tensor([7]), states)
    output.square().mean().backward()
    assert states.sequence.grad is not None and states.sequence.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_is_as_asked_whatever_is_stored(
    copy: Path, folder: Path, dtype: torch.dtype
) -> None:
    for file in copy.rglob("*.safetensors"):
        save_file({name: x.half() for name, x in load_file(file).items()}, file)
    in_full, stored_half = load_base(folder), load_base(copy)
    assert {p.dtype for part in stored_half.parts().values() for p in part.parameters()} == {
        torch.float32
    }
    in_half = load_base(folder, dtype=dtype)
    assert {p.dtype for part in in_half.parts().values() for p in part.parameters()} == {dtype}
    assert in_half.dtype == dtype
    assert in_half.encode_text(["red cat"]).sequence.dtype == dtype
    assert stored_half.fingerprint() == in_half.fingerprint() == in_full.fingerprint()


def test_files_that_are_stored_only_as_fp16_variant_are_found(copy: Path) -> None:
    for file in copy.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert load_base(copy).fingerprint()


def test_another_base_has_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_base(tmp_path / "other", seed=1)
    assert load_base(folder).fingerprint() != load_base(other).fingerprint()
    bare = write_tiny_base(tmp_path / "bare", image_encoder=False)
    assert load_base(bare).image_encoder is None
    assert load_base(folder).fingerprint() != load_base(bare).fingerprint()


def test_a_fine_tune_reads_what_its_base_prepared(folder: Path) -> None:
    """Denoiser and text encoder are another's; what encoded the data is the same."""
    base, tuned = load_base(folder), load_base(folder)
    known = base.encoders_fingerprint()
    with torch.no_grad():
        for part in (tuned.unet, tuned.text_encoder):
            for weight in part.parameters():
                weight.neg_()
    assert tuned.fingerprint() != base.fingerprint()
    assert tuned.encoders_fingerprint() == known
    for name in ("vae", "image_encoder"):
        other = load_base(folder)
        with torch.no_grad():
            for weight in other.parts()[name].parameters():
                weight.neg_()
        assert other.encoders_fingerprint() != known


def test_data_of_another_tokenizer_are_told(folder: Path, monkeypatch) -> None:
    base = load_base(folder)
    known, tokenize = base.encoders_fingerprint(), base.tokenize
    monkeypatch.setattr(base, "tokenize", lambda texts: tokenize(texts) + 1)
    assert base.encoders_fingerprint() != known


def test_any_kind_of_scheduler_is_read(copy: Path) -> None:
    """Stable Diffusion 1.5's folder names PNDM, with settings a DDIM scheduler does not know."""
    file = copy / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    config |= {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    file.write_text(json.dumps(config))
    scheduler = load_base(copy).scheduler
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config.clip_sample is False and scheduler.config.steps_offset == 1


def test_the_embedded_base_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imprompt.core.shipped.WEIGHTS", Path("nowhere"))
    with pytest.raises(ImpromptError, match="lacks diorama-base"):
        load_base("diorama")


def test_a_stock_pipeline_draws_from_the_embedded_base() -> None:
    from diffusers import StableDiffusionPipeline

    base = load_base("diorama")
    pipeline = StableDiffusionPipeline.from_pretrained(diorama_folder())
    pipeline.set_progress_bar_config(disable=True)
    (theirs,) = pipeline(
        "a red house",
        num_inference_steps=4,
        latents=initial_noise(0, [0], base.latent_shape()),
        output_type="np",
    ).images
    (ours,) = generate(base, "a red house", steps=4, guidance_scale=7.5, progress=False)
    assert abs(numpy.asarray(ours) - theirs * 255).max() <= 1
    assert base.image_encoder is not None


@pytest.mark.parametrize("name", ["no/such/folder", "nothing", "diorama2", "/no/model.safetensors"])
def test_what_is_nowhere_is_said_to_be_nowhere(name: str) -> None:
    with pytest.raises(ImpromptError, match="There is no base .*diffusers folder"):
        load_base(name)


def test_a_hub_id_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(ImpromptError, match="someone/some-model.* neither here nor to be had"):
        load_base("someone/some-model")


def test_other_kinds_of_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"pickle")
    with pytest.raises(ImpromptError, match=r"no \.safetensors file"):
        load_base(file)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"not at all")
    with pytest.raises(ImpromptError, match="damaged"):
        load_base(file)
    save_file({"image_proj.norm.weight": torch.ones(3)}, file)
    with pytest.raises(ImpromptError, match="no Stable Diffusion checkpoint"):
        load_base(file)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises(ImpromptError, match=f"its {part} could not be read"):
        load_base(copy)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImpromptError, match=r"no model_index\.json"):
        load_base(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ImpromptError, match="no JSON"):
        load_base(tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "image_encoder"])
def test_weights_with_holes_are_refused(copy: Path, part: str) -> None:
    """The libraries would fill them with random numbers."""
    file = next((copy / part).glob("*.safetensors"))
    tensors = load_file(file)
    missing = sorted(tensors)[3]
    del tensors[missing]
    save_file(tensors, file)
    with pytest.raises(ImpromptError, match=f"its {part} lacks 1 tensors"):
        load_base(copy)


def test_a_truncated_file_is_refused(copy: Path) -> None:
    file = next((copy / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ImpromptError, match="its unet could not be read"):
        load_base(copy)


def test_a_tokenizer_without_vocabulary_is_refused(copy: Path) -> None:
    (copy / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(ImpromptError, match="its tokenizer could not be read"):
        load_base(copy)


def test_xl_models_are_told_apart(copy: Path) -> None:
    file = copy / "unet" / "config.json"
    config = json.loads(file.read_text())
    config |= {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32,
    }
    file.write_text(json.dumps(config))
    with pytest.raises(ImpromptError, match="tiny|copy"):
        load_base(copy)


def test_sizes_that_cannot_be_are_refused(folder: Path) -> None:
    base = load_base(folder)
    for size_px in (30, 0, -4, (32, 33)):
        with pytest.raises(ImpromptError, match="multiples of 4 px"):
            base.latent_shape(size_px)


def test_every_base_has_a_guidance_of_its_own(folder: Path) -> None:
    base = load_base(folder)
    assert (base.guidance_scale, load_base("diorama").guidance_scale) == (7.5, 3.0)
    base.guidance_scale = 3.0
    unsaid, said, other = (
        generate(base, "a house", steps=2, progress=False, **asked)[0].tobytes()
        for asked in ({}, {"guidance_scale": 3.0}, {"guidance_scale": 7.5})
    )
    assert unsaid == said != other
