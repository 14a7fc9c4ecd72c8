"""Samplers: each of them, given a perfect denoiser, arrives at the clean sample."""

from typing import Any

import pytest
import torch

from imprompt.core.errors import ImpromptError
from imprompt.diffusion.late_start import last_timesteps, noise_level
from imprompt.diffusion.objectives import (
    PREDICTIONS,
    alphas_cumprod_of,
    predicted_noise,
    prediction_target,
)
from imprompt.diffusion.samplers import SAMPLERS, Sampler, create_sampler, uses_noise

CONFIG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}

SPACINGS = [
    {"timestep_spacing": "leading", "set_alpha_to_one": False, "steps_offset": 1},
    {"timestep_spacing": "trailing", "set_alpha_to_one": True, "steps_offset": 1},
]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS, ids=["leading", "trailing"])
def test_a_perfect_denoiser_is_followed_to_the_clean_sample(
    name: str, prediction: str, spacing: dict[str, Any]
) -> None:
    if prediction == "sample" and SAMPLERS[name].needs_noise:
        return  # refused, see below
    config = {**CONFIG, **spacing, "prediction_type": prediction}
    alphas = alphas_cumprod_of(config)
    scheduler = create_sampler(name, config, 20)
    clean = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(clean.shape, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, timestep)
        alpha = alphas[int(timestep)].reshape(1)
        noise = predicted_noise("sample", clean, noisy, alpha)
        output = prediction_target(prediction, clean, noise, alpha)
        extra = {"generator": generator} if uses_noise(name) else {}
        latents = scheduler.step(output, timestep, latents, **extra, return_dict=False)[0]
    assert (latents - clean).abs().mean() < 0.05


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++", "euler", "euler-ancestral"])
def test_few_steps_begin_at_the_last_timestep_where_that_is_asked_for(sampler: str) -> None:
    """As Lightning's and Hyper's models want it, of a base whose own scheduler leads."""
    trailing = Sampler(name=sampler, timestep_spacing="trailing")
    timesteps = create_sampler(trailing, {**CONFIG, **SPACINGS[0]}, 4).timesteps
    assert timesteps.tolist() == [999, 749, 499, 249]
    assert create_sampler(sampler, {**CONFIG, **SPACINGS[0]}, 4).timesteps[0] < 999


def test_the_steps_of_a_consistency_model_are_those_it_was_distilled_on() -> None:
    assert create_sampler("lcm", CONFIG, 4).timesteps.tolist() == [999, 759, 499, 259]


@pytest.mark.parametrize("sampler", ["dpm-solver++", "euler"])
def test_karras_s_levels_of_noise_are_evenly_spaced_in_their_seventh_root(sampler: str) -> None:
    karras = create_sampler(Sampler(name=sampler, karras_sigmas=True), CONFIG, 10)
    roots = karras.sigmas[:10].double() ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(9), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("share", [1.0, 0.6, 0.1, 0.01])
@pytest.mark.parametrize("spacing", SPACINGS, ids=["leading", "trailing"])
def test_from_a_late_start_a_perfect_denoiser_goes_straight_to_the_clean_sample(
    name: str, share: float, spacing: dict[str, Any]
) -> None:
    config = {**CONFIG, **spacing, "prediction_type": "epsilon"}
    scheduler = create_sampler(name, config, 20)
    timesteps = last_timesteps(scheduler, share)
    assert len(timesteps) == max(1, round(20 * share)) + (name == "pndm" and share > 0.05)
    clean = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    extra = {"generator": torch.Generator().manual_seed(1)} if uses_noise(name) else {}
    signal, deviation = noise_level(scheduler, timesteps[0])
    latents = signal * clean + deviation * noise
    for timestep in timesteps:
        signal, deviation = noise_level(scheduler, timestep)
        if not uses_noise(name):  # it takes other noise at every step
            torch.testing.assert_close(latents, signal * clean + deviation * noise)
        output = (latents - signal * clean) / deviation
        latents = scheduler.step(output, timestep, latents, **extra, return_dict=False)[0]
    assert (latents - clean).abs().mean() < 0.1


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 1000])
@pytest.mark.parametrize("spacing", SPACINGS, ids=["leading", "trailing"])
def test_every_number_of_steps_up_to_that_of_training_works(
    name: str, num_steps: int, spacing: dict[str, Any]
) -> None:
    scheduler = create_sampler(name, {**CONFIG, **spacing}, num_steps)
    assert scheduler.timesteps.min() >= 0 and scheduler.timesteps.max() <= 999


def test_mistakes_are_named() -> None:
    with pytest.raises(ImpromptError, match="no sampler 'DDIM'; use one of ddim, dpm-solver"):
        create_sampler("DDIM", CONFIG, 10)
    with pytest.raises(ImpromptError, match="use another"):
        create_sampler("pndm", {**CONFIG, "prediction_type": "sample"}, 10)
    with pytest.raises(ImpromptError, match="'pndm' does not know schedules that end in noise"):
        create_sampler("pndm", {**CONFIG, "rescale_betas_zero_snr": True}, 10)
    with pytest.raises(ImpromptError, match="use one of leading, trailing, linspace"):
        create_sampler(Sampler(timestep_spacing="even"), CONFIG, 10)
    with pytest.raises(ImpromptError, match="'lcm' has a spacing of its own"):
        create_sampler(Sampler(name="lcm", timestep_spacing="trailing"), CONFIG, 4)
    with pytest.raises(ImpromptError, match=r"for the samplers dpm-solver\+\+, euler, not"):
        create_sampler(Sampler(name="ddim", karras_sigmas=True), CONFIG, 4)
    for num_steps in (0, 1001):
        with pytest.raises(ImpromptError, match="allowed are 1 to 1000"):
            create_sampler("ddim", CONFIG, num_steps)
