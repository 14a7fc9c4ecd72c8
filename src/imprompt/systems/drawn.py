"""What a system draws by itself, as far as the step that is learnt from.

A denoiser that is shown noise on a true picture needs only go on with what it sees of it. Left alone with
noise it goes its own way, and what goes wrong there, no true picture tells. So a picture is drawn from
noise, up to a step of its own; what is predicted there can be judged, and gradients flow through that one
prediction.

Source: ReFL (2304.05977), algorithm 1, here at any step that shows something; for persons, ID-Aligner
(2404.15449).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from imprompt.core.randomness import Randomness
from imprompt.diffusion.objectives import add_noise, predicted_clean, predicted_noise
from imprompt.systems.denoising import Denoising

LATEST_START = (
    0.5  # of a step; noise alone is the beginning, so the first step must see hardly more
)

Predict = Callable[[Tensor, Tensor, list[int]], Tensor]
"""Of noisy latents, their timesteps and which rows these are, what the denoiser predicts, guided."""


def drawn_steps(
    denoising: Denoising, randomness: Randomness, num_steps: int, min_signal: float
) -> tuple[Int[Tensor, "batch steps"], Int[Tensor, " batch"]]:
    """The timesteps that each sample is drawn by, falling, and the number of the one it stops at.

    All that have more signal than `min_signal` (ᾱ_t) are alike likely to be the one, or else the last.
    Steps are evenly spread, and shifted for each sample by its own part of a step.
    """
    num_timesteps = len(denoising.alphas)
    shifts = LATEST_START * randomness.uniform("drawn: shift")
    steps = torch.arange(num_steps, 0, -1, device=shifts.device) - shifts[:, None]
    timesteps = (steps / num_steps * num_timesteps).long().clamp(max=num_timesteps - 1)
    num_shown = (denoising.alphas[timesteps] > min_signal).sum(1).clamp(min=1)
    from_the_end = (randomness.uniform("drawn: stop") * num_shown).long()
    return timesteps, num_steps - 1 - torch.minimum(from_the_end, num_shown - 1)


def drawn_clean(
    predict: Predict,
    denoising: Denoising,
    randomness: Randomness,
    shape: tuple[int, ...],
    *,
    num_steps: int,
    min_signal: float,
) -> Float[Tensor, "batch channels h w"]:
    """The clean latents x0 that are predicted where each drawing stops, with gradients of this prediction.

    Args:
        shape: of one sample's latents.
        num_steps: of the whole drawing, by DDIM (2010.02502, equation 12 with η = 0).
        min_signal: ᾱ_t; no drawing stops before.
    """
    timesteps, stops = drawn_steps(denoising, randomness, num_steps, min_signal)
    noisy = randomness.normal("drawn: noise", shape)
    kind, alphas = denoising.prediction_type, denoising.alphas
    with torch.no_grad():
        for step in range(int(stops.max())):
            rows = (stops > step).nonzero()[:, 0]
            before, now = noisy[rows], timesteps[rows, step]
            prediction = predict(before, now, rows.tolist()).float()
            clean = predicted_clean(kind, prediction, before, alphas[now])
            noise = predicted_noise(kind, prediction, before, alphas[now])
            noisy[rows] = add_noise(clean, noise, alphas[timesteps[rows, step + 1]])
    rows = torch.arange(len(stops), device=stops.device)
    now = timesteps[rows, stops]
    prediction = predict(noisy, now, rows.tolist()).float()
    return predicted_clean(kind, prediction, noisy, alphas[now])
