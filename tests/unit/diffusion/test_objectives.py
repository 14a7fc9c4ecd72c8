"""Objectives against diffusers' schedulers, against each other, and at their limits."""

import pytest
import torch

from imprompt.core.errors import ImpromptError
from imprompt.diffusion.objectives import (
    PREDICTIONS,
    SCHEDULES,
    add_noise,
    alphas_cumprod,
    alphas_cumprod_of,
    min_snr_weights,
    predicted_clean,
    predicted_noise,
    prediction_target,
    signal_to_noise,
    velocity,
)

TIMESTEPS = torch.tensor([0, 10, 500, 999])


@pytest.fixture
def clean() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_schedules_are_those_of_diffusers(schedule: str, zero_terminal_snr: bool) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule=schedule,
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    ours = alphas_cumprod(schedule, zero_terminal_snr=zero_terminal_snr)
    torch.testing.assert_close(ours, scheduler.alphas_cumprod, rtol=1e-4, atol=2e-6)
    assert torch.equal(ours, alphas_cumprod_of(scheduler.config))
    assert (ours.diff() < 0).all()
    if zero_terminal_snr:
        assert ours[-1] == 0


def test_a_config_without_a_schedule_has_diffusers_defaults() -> None:
    from diffusers import DDPMScheduler

    torch.testing.assert_close(
        alphas_cumprod_of({}), DDPMScheduler().alphas_cumprod, rtol=1e-4, atol=2e-6
    )


def test_a_config_may_hold_its_own_betas() -> None:
    alphas = alphas_cumprod_of({"trained_betas": [0.1, 0.2, 0.3]})
    torch.testing.assert_close(alphas, torch.tensor([0.9, 0.72, 0.504]))


def test_noise_and_velocity_are_those_of_diffusers(
    clean: torch.Tensor, noise: torch.Tensor
) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    alphas = alphas_cumprod("squaredcos_cap_v2")[TIMESTEPS]
    theirs = scheduler.add_noise(clean, noise, TIMESTEPS)
    torch.testing.assert_close(add_noise(clean, noise, alphas), theirs, rtol=1e-4, atol=1e-4)
    theirs = scheduler.get_velocity(clean, noise, TIMESTEPS)
    torch.testing.assert_close(velocity(clean, noise, alphas), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_implies_clean_sample_and_noise(
    prediction: str, clean: torch.Tensor, noise: torch.Tensor
) -> None:
    alphas = alphas_cumprod("scaled_linear")[TIMESTEPS]
    noisy = add_noise(clean, noise, alphas)
    output = prediction_target(prediction, clean, noise, alphas)
    for implied, truth in ((predicted_clean, clean), (predicted_noise, noise)):
        found = implied(prediction, output, noisy, alphas)
        torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_gives_every_prediction_the_same_loss(
    prediction: str, clean: torch.Tensor, noise: torch.Tensor
) -> None:
    """min(SNR, γ)·|x0 error|², said for another prediction, is the same number."""
    alphas = alphas_cumprod("scaled_linear")[torch.tensor([100, 300, 600, 999])]
    noisy = add_noise(clean, noise, alphas)
    guess = clean + 0.1 * noise.flip(0)
    implied_noise = predicted_noise("sample", guess, noisy, alphas)
    output = prediction_target(prediction, guess, implied_noise, alphas)
    error = output - prediction_target(prediction, clean, noise, alphas)
    loss = min_snr_weights(prediction, alphas) * error.square().mean(dim=(1, 2, 3))
    wanted = signal_to_noise(alphas).clamp(max=5.0) * (guess - clean).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=1e-6)


def test_min_snr_is_finite_where_no_signal_is_left() -> None:
    for prediction in PREDICTIONS:
        weights = min_snr_weights(prediction, torch.tensor([0.0, 0.5]))
        assert weights.isfinite().all()


def test_half_precision_keeps_the_noise_of_the_first_step() -> None:
    clean = torch.zeros(1, 4, dtype=torch.bfloat16)
    noisy = add_noise(clean, torch.ones_like(clean), alphas_cumprod("scaled_linear")[:1])
    assert noisy.dtype == torch.bfloat16
    assert (noisy > 0.02).all()


def test_mistakes_are_named() -> None:
    with pytest.raises(ImpromptError, match="'cosine' is unknown; use one of linear"):
        alphas_cumprod("cosine")
    with pytest.raises(ImpromptError, match="num_timesteps"):
        alphas_cumprod("linear", 0)
    with pytest.raises(ImpromptError, match="beta_start"):
        alphas_cumprod("linear", beta_start=0.5, beta_end=0.1)
    with pytest.raises(ImpromptError, match="'v' is unknown; use one of epsilon"):
        prediction_target("v", torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1))
    with pytest.raises(ImpromptError, match="gamma"):
        min_snr_weights("epsilon", torch.ones(1), gamma=0.0)
