"""The forward process of a diffusion model and what its network is asked to predict.

Written for a variance-preserving process with T discrete timesteps. With ᾱ_t the running product of
(1 - β_t), a clean sample x0 becomes

    x_t = √ᾱ_t · x0 + √(1 - ᾱ_t) · ε                                   (DDPM, eq. 4)

Everything below takes ᾱ at each sample's own timestep (`alphas_cumprod(...)[timesteps]`), so that
the functions hold no state and work for any schedule.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.core.errors import ImpromptError

Prediction = Literal["epsilon", "v_prediction", "sample"]
Schedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]

PREDICTIONS: tuple[str, ...] = get_args(Prediction)
SCHEDULES: tuple[str, ...] = get_args(Schedule)

# A step of the cosine schedule destroys at most this much, or its last step would divide by zero.
COSINE_MAX_BETA = 0.999
COSINE_OFFSET = 0.008


def alphas_cumprod(
    schedule: str,
    num_timesteps: int = 1000,
    *,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    zero_terminal_snr: bool = False,
) -> Float[Tensor, "timesteps"]:
    """How much of the clean sample's variance is left at each timestep: ᾱ_t in [0, 1], falling.

    Computed in float64, returned in float32. The names are those of diffusers' schedulers;
    `beta_start` and `beta_end` do not apply to the cosine schedule.

    Raises:
        ImpromptError: the schedule is unknown or its numbers are not usable.

    Source: DDPM (2006.11239) section 4, linear; Latent Diffusion (2112.10752), scaled_linear;
    Improved DDPM (2102.09672) eq. 17, squaredcos_cap_v2; Lin et al. (2305.08891) algorithm 1,
    zero_terminal_snr.
    """
    if num_timesteps < 1:
        raise ImpromptError(f"num_timesteps is {num_timesteps}, but must be at least 1.")
    if schedule in ("linear", "scaled_linear") and not 0 < beta_start <= beta_end < 1:
        raise ImpromptError(
            f"beta_start={beta_start} and beta_end={beta_end} are no noise schedule: "
            "0 < beta_start <= beta_end < 1 is needed."
        )
    if schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64)
        betas = roots.square()
    elif schedule == "squaredcos_cap_v2":
        time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        kept = torch.cos((time + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).square()
        betas = (1 - kept[1:] / kept[:-1]).clamp(max=COSINE_MAX_BETA)
    else:
        raise ImpromptError(
            f"The noise schedule {schedule!r} is unknown; use one of {', '.join(SCHEDULES)}."
        )
    alphas = torch.cumprod(1 - betas, dim=0)
    if zero_terminal_snr and num_timesteps > 1:
        roots = alphas.sqrt()
        first, last = roots[0], roots[-1]
        alphas = ((roots - last) * first / (first - last)).square()
    return alphas.to(torch.float32)


def alphas_cumprod_of(scheduler_config: Mapping[str, Any]) -> Float[Tensor, "timesteps"]:
    """ᾱ_t of a diffusers scheduler's configuration, as a model was or will be trained with.

    Raises:
        ImpromptError: the configuration asks for a schedule that is not known here.
    """
    betas = scheduler_config.get("trained_betas")
    if betas is not None:
        steps = 1 - torch.tensor(betas, dtype=torch.float64)
        return torch.cumprod(steps, dim=0).to(torch.float32)
    return alphas_cumprod(
        scheduler_config.get("beta_schedule", "linear"),
        scheduler_config.get("num_train_timesteps", 1000),
        beta_start=scheduler_config.get("beta_start", 0.0001),
        beta_end=scheduler_config.get("beta_end", 0.02),
        zero_terminal_snr=bool(scheduler_config.get("rescale_betas_zero_snr", False)),
    )


def signal_and_noise_rates(
    alphas: Float[Tensor, "batch"], like: Float[Tensor, "batch *shape"]
) -> tuple[Float[Tensor, "batch *ones"], Float[Tensor, "batch *ones"]]:
    """√ᾱ and √(1 - ᾱ), shaped to be multiplied with `like`, in its dtype and on its device.

    The roots are taken in float32, for half precision rounds 1 - ᾱ to zero at the first steps.
    """
    alphas = alphas.to(device=like.device, dtype=torch.float32)
    shape = (-1, *[1] * (like.ndim - 1))
    signal = alphas.sqrt().reshape(shape)
    noise = (1 - alphas).sqrt().reshape(shape)
    return signal.to(like.dtype), noise.to(like.dtype)


def add_noise(
    clean: Float[Tensor, "batch *shape"],
    noise: Float[Tensor, "batch *shape"],
    alphas: Float[Tensor, "batch"],
) -> Float[Tensor, "batch *shape"]:
    """The noisy sample x_t that training shows to the network. Source: DDPM (2006.11239) eq. 4."""
    signal_rate, noise_rate = signal_and_noise_rates(alphas, clean)
    return signal_rate * clean + noise_rate * noise


def velocity(
    clean: Float[Tensor, "batch *shape"],
    noise: Float[Tensor, "batch *shape"],
    alphas: Float[Tensor, "batch"],
) -> Float[Tensor, "batch *shape"]:
    """v = √ᾱ·ε - √(1 - ᾱ)·x0. Source: Salimans & Ho (2202.00512) section 4 and appendix D."""
    signal_rate, noise_rate = signal_and_noise_rates(alphas, clean)
    return signal_rate * noise - noise_rate * clean


def prediction_target(
    prediction: str,
    clean: Float[Tensor, "batch *shape"],
    noise: Float[Tensor, "batch *shape"],
    alphas: Float[Tensor, "batch"],
) -> Float[Tensor, "batch *shape"]:
    """What the network should answer for x_t = add_noise(clean, noise, alphas).

    Raises:
        ImpromptError: the kind of prediction is unknown.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return clean
    if prediction == "v_prediction":
        return velocity(clean, noise, alphas)
    raise unknown_prediction(prediction)


def predicted_clean(
    prediction: str,
    output: Float[Tensor, "batch *shape"],
    noisy: Float[Tensor, "batch *shape"],
    alphas: Float[Tensor, "batch"],
) -> Float[Tensor, "batch *shape"]:
    """The clean sample x0 that a network's output implies.

    An ε-prediction says nothing about x0 where no signal is left (ᾱ = 0): the result is infinite.

    Raises:
        ImpromptError: the kind of prediction is unknown.
    """
    signal_rate, noise_rate = signal_and_noise_rates(alphas, noisy)
    if prediction == "epsilon":
        return (noisy - noise_rate * output) / signal_rate
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        return signal_rate * noisy - noise_rate * output
    raise unknown_prediction(prediction)


def predicted_noise(
    prediction: str,
    output: Float[Tensor, "batch *shape"],
    noisy: Float[Tensor, "batch *shape"],
    alphas: Float[Tensor, "batch"],
) -> Float[Tensor, "batch *shape"]:
    """The noise ε that a network's output implies; the mirror of `predicted_clean`.

    Raises:
        ImpromptError: the kind of prediction is unknown.
    """
    signal_rate, noise_rate = signal_and_noise_rates(alphas, noisy)
    if prediction == "epsilon":
        return output
    if prediction == "sample":
        return (noisy - signal_rate * output) / noise_rate
    if prediction == "v_prediction":
        return noise_rate * noisy + signal_rate * output
    raise unknown_prediction(prediction)


def signal_to_noise(alphas: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """SNR = ᾱ / (1 - ᾱ). Source: Kingma et al. (2107.00630) eq. 2."""
    alphas = alphas.to(torch.float32)
    return alphas / (1 - alphas)


def min_snr_weights(
    prediction: str, alphas: Float[Tensor, "batch"], gamma: float = 5.0
) -> Float[Tensor, "batch"]:
    """Weights that keep easy timesteps from drowning out the others in the squared-error loss.

    They give the loss on x0 the weight min(SNR, γ), said for the loss on what is predicted:
    min(SNR, γ) for x0, over SNR for ε, over SNR + 1 for v. Where no signal is left (SNR = 0) the
    ε weight is its limit, 1.

    Raises:
        ImpromptError: the kind of prediction is unknown or γ is not positive.

    Source: Hang et al. (2303.09556) section 3.4.
    """
    if not gamma > 0:
        raise ImpromptError(f"min-SNR's gamma is {gamma}, but must be positive (the paper: 5).")
    snr = signal_to_noise(alphas)
    if prediction == "sample":
        return snr.clamp(max=gamma)
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    if prediction == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    raise unknown_prediction(prediction)


def unknown_prediction(prediction: str) -> ImpromptError:
    """The error for a kind of prediction that does not exist."""
    return ImpromptError(
        f"The prediction type {prediction!r} is unknown; use one of {', '.join(PREDICTIONS)}."
    )
