"""What losses and validations are made of, in all systems that denoise."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_base import write_tiny_base

from imprompt.bases import load_base
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns, ColumnsWriter
from imprompt.data.prepare import prepare
from imprompt.diffusion.objectives import prediction_target
from imprompt.systems import controlnet, face_id, image_prompt, instruct, instruct_words
from imprompt.systems.controlnet import ControlNetOptions
from imprompt.systems.denoising import Denoising, sample_posterior
from imprompt.systems.image_prompt import ImagePromptOptions
from imprompt.systems.instruct_options import InstructOptions
from imprompt.systems.instruct_words import InstructWordsOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("p")
    write_tiny_base(folder / "base", image_encoder=True)
    base = load_base(folder / "base")
    prepare("diorama:6", folder / "data", base)
    prepare("diorama-instruct:10", folder / "instruct", base, variant="instruct-words")
    return folder


@pytest.fixture
def base(folder):
    return load_base(folder / "base")


def test_a_latent_is_drawn_from_its_distribution_and_scaled(base):
    batch = {
        "latent_mean": torch.ones(2, *base.latent_shape()),
        "latent_logvar": torch.full((2, *base.latent_shape()), -2.0),
    }
    randomness = Randomness(0, range(2))
    expected = base.vae.config.scaling_factor * (
        1 + math.exp(-1) * randomness.normal("posterior", base.latent_shape())
    )
    torch.testing.assert_close(sample_posterior(batch, randomness, base), expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_right_prediction_of_each_kind_has_no_error(kind):
    denoising = Denoising(DDIMScheduler(prediction_type=kind), torch.device("cpu"))
    randomness, latents, timesteps = (
        Randomness(0, range(3)),
        torch.randn(3, 2, 4, 4),
        torch.tensor([5, 500, 990]),
    )
    noise = randomness.normal("noise", (2, 4, 4))
    wanted = prediction_target(kind, latents, noise, denoising.alphas[timesteps])
    assert denoising.errors(lambda noisy: wanted, latents, randomness, timesteps).max() < 1e-6


def test_min_snr_weighs_an_image_prompts_timesteps(base, folder):
    columns = Columns.open(folder / "data")
    plain, weighted = (
        image_prompt.build(ImagePromptOptions(snr_gamma=g), base, columns) for g in (0.0, 1.0)
    )
    batch = columns.rows(range(6), plain.columns)
    assert (
        weighted.loss(batch, Randomness(0, range(6)))[0]
        < 0.99 * plain.loss(batch, Randomness(0, range(6)))[0]
    )


SMALL = InstructOptions(num_tokens=3, resampler_dim=64, depth=1)


def test_min_snr_weighs_instructs_timesteps(base, folder):
    columns = Columns.open(folder / "instruct")
    plain, weighted = (
        instruct.build(replace(SMALL, snr_gamma=g), base, columns) for g in (0.0, 1.0)
    )
    batch = columns.rows(range(10), plain.columns)
    assert (
        weighted.loss(batch, Randomness(0, range(10)))[0]
        < 0.99 * plain.loss(batch, Randomness(0, range(10)))[0]
    )


def test_validation_leaves_out_what_its_figures_say(base, folder):
    columns = Columns.open(folder / "data")
    system = image_prompt.build(ImagePromptOptions(), base, columns)
    batch = columns.rows(range(6), system.columns)
    figures = system.validate(batch, Randomness(0, range(6)))
    assert len(set(figures.values())) == 4, figures
    without_text = {**batch, "text_ids": base.tokenize([""]).expand(6, -1)}
    silent = system.validate(without_text, Randomness(0, range(6)))
    assert silent["loss_with_image_and_text"] == pytest.approx(figures["loss_with_image"])
    assert silent["loss_with_text"] == pytest.approx(figures["loss_without_image"])


def test_validation_of_instruct_leaves_out_one_thing_at_a_time(base, folder):
    columns = Columns.open(folder / "instruct")
    system = instruct.build(SMALL, base, columns)
    figures = system.validate(columns.rows(range(10), system.columns), Randomness(0, range(10)))
    assert len(set(figures.values())) == 4, figures


def test_the_words_that_tokens_learn_are_those_after_the_beginning(base, folder):
    columns = Columns.open(folder / "instruct")
    system = instruct_words.build(
        InstructWordsOptions(num_tokens=3, resampler_dim=64, depth=1), base, columns
    )
    ids = columns.rows(range(3), ["kept_ids"])["kept_ids"]
    assert torch.equal(system._words(ids), base.encode_text(ids).sequence[:, 1:4])


def test_no_face_is_zero_pixels_to_the_image_encoder(base, tmp_path):
    writer = ColumnsWriter(tmp_path)
    states = base.image_encoder.zero_hidden_states()
    writer.write(
        0, {"id_embeds": torch.randn(2, 8), "reference_hidden_states": states.repeat(2, 1, 1)}
    )
    writer.finish(2, {"encoders_fingerprint": base.encoders_fingerprint()})
    system = face_id.build(
        face_id.FaceIdOptions(variant="faceid-plus", lora_rank=2), base, Columns.open(tmp_path)
    )
    torch.testing.assert_close(system.dropped_features["reference_hidden_states"], states)
    assert states.any()


def test_maps_are_shares_of_255(base, folder):
    prepare(
        "diorama:4",
        folder / "maps",
        base,
        columns=("latent_mean", "latent_logvar", "text_ids", "control_depth"),
    )
    system = controlnet.build(ControlNetOptions(kind="depth"), base, Columns.open(folder / "maps"))
    maps = system.maps({"control_depth": torch.tensor([0, 51, 255], dtype=torch.uint8)})
    torch.testing.assert_close(maps, torch.tensor([0, 0.2, 1.0]))
