"""What systems that learn to denoise have in common: the right data, texts with their framing, latents,
timesteps and the error of a prediction, and validating in parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from jaxtyping import Float, Int
from torch import Tensor

from imprompt.bases import Base, TextStates
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.columns import FRAMING
from imprompt.data.rows import Rows
from imprompt.diffusion.objectives import (
    add_noise,
    alphas_cumprod_of,
    min_snr_weights,
    predicted_clean,
    prediction_target,
)


def check_same_encoders(columns: Rows, base: Base) -> None:
    """Raise an ImpromptError if the data were encoded by others than this base's encoders."""
    prepared, name = columns.meta.get("encoders_fingerprint"), columns.meta.get("base")
    if prepared == base.encoders_fingerprint():
        return
    hint = "prepare them with this base."
    if name == base.name:
        hint = "were they prepared with another --image-encoder? Else prepare them anew."
    raise ImpromptError(
        f"The data in {columns.path} were prepared with {name or 'another base'} (encoders {prepared}), not with "
        f"the encoders of {base.name} ({base.encoders_fingerprint()}): {hint}"
    )


def made_for(base: Base) -> dict[str, str]:
    """What a file that was trained beside a base tells of it."""
    return {"base": base.name, "base_fingerprint": base.fingerprint()}


def drawn_shares(draw: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """For each share which samples it gets, (batch,), by one number in [0, 1) each.

    No sample is in two shares, so that they add up.
    """
    masks: list[Tensor] = []
    begin = 0.0
    for share in shares:
        masks.append((draw >= begin) & (draw < begin + share))
        begin += share
    return masks


def framing_columns(columns: Sequence[str], base: Base, data: Rows) -> tuple[str, ...]:
    """What is read beside a system's own columns: the framing, if it denoises, the base reads it and the
    data have it. Data that were prepared without show whole pictures."""
    if not base.reads_framing or "latent_mean" not in columns:
        return ()
    try:
        data.require([FRAMING])
    except ImpromptError:
        return ()
    return (FRAMING,)


def text_states_of(
    base: Base, text_ids: Int[Tensor, "batch length"], batch: dict[str, Tensor]
) -> TextStates:
    """What the denoiser reads of texts, and of the framing of a batch's pictures where that was read."""
    text_states = base.encode_text(text_ids)
    return replace(text_states, framing=batch[FRAMING]) if FRAMING in batch else text_states


def replace_rows(values: Tensor, replacement: Tensor, where: Tensor) -> Tensor:
    """`values` (batch, …) with the rows that `where` (batch,) marks replaced by `replacement` (1, …)."""
    marked = where.reshape(-1, *[1] * (values.ndim - 1))
    return torch.where(marked, replacement.to(values), values)


def sample_posterior(batch: dict[str, Tensor], randomness: Randomness, base: Base) -> Tensor:
    """Latents drawn from the cached posterior, in the denoiser's scale."""
    mean = batch["latent_mean"].float()
    deviation = (0.5 * batch["latent_logvar"].float()).exp()
    noise = randomness.normal("posterior", tuple(mean.shape[1:]))
    return (mean + deviation * noise) * float(base.vae.config.scaling_factor)


class Attempt(NamedTuple):
    """What came of predicting noise, of each sample."""

    errors: Float[Tensor, " batch"]
    """The squared error."""
    latents: Float[Tensor, "batch channels h w"]
    """What the noise was laid on."""
    noisy: Float[Tensor, "batch channels h w"]
    prediction: Float[Tensor, "batch channels h w"]
    prediction_type: str
    signal: Float[Tensor, " batch"]
    """ᾱ_t in [0, 1], how much of x0 was to be seen."""

    @property
    def clean(self) -> Float[Tensor, "batch channels h w"]:
        """The clean latents x0 that the prediction implies, in the denoiser's scale."""
        return predicted_clean(
            self.prediction_type, self.prediction.float(), self.noisy, self.signal
        )


def share_moved(
    attempt: Attempt, held: Tensor, predict_before: Callable[[Tensor], Tensor]
) -> Float[Tensor, ""]:
    """How far predictions moved from what another denoiser says, squared: the sum over the samples that are held
    to it, of which there may be none, divided by the number of all, so that a batch may be cut into parts.

    Args:
        held: which samples are, (batch,).
        predict_before: of the numbers of these what the other denoiser predicts, for the same noisy latents.
    """
    rows = held.nonzero()[:, 0]
    if not len(rows):
        return attempt.errors.new_zeros(())
    with torch.no_grad():
        before = predict_before(rows).float()
    moved = (attempt.prediction[rows].float() - before).square().mean((1, 2, 3))
    return moved.sum() / len(held)


class Denoising:
    """Learning to denoise as a scheduler says: which timesteps there are, and what is predicted."""

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        """`scheduler` is one of diffusers', of which the configuration is read."""
        self.alphas = alphas_cumprod_of(scheduler.config).to(device)
        """ᾱ_t of each timestep, (timesteps,)."""
        self.prediction_type = str(scheduler.config["prediction_type"])

    def draw_timesteps(
        self, randomness: Randomness, *, early: bool = False
    ) -> Int[Tensor, " batch"]:
        """One for each sample, all alike likely; with `early` those of much noise more so (t = 1 - u³,
        2302.08453, section 3.4)."""
        time = randomness.uniform("timestep")
        if early:
            time = 1 - time**3
        return (time * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)

    def spread_timesteps(self, count: int) -> Int[Tensor, " count"]:
        """Timesteps over the whole range, evenly, for validation."""
        position = (torch.arange(count, device=self.alphas.device) + 0.5) / count
        return (position * len(self.alphas)).long()

    def errors(
        self,
        predict: Callable[[Tensor], Tensor],
        latents: Float[Tensor, "batch channels h w"],
        randomness: Randomness,
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, " batch"]:
        """The squared error of each sample's prediction; `predict` gets the noisy latents."""
        return self.attempt(predict, latents, randomness, timesteps).errors

    def attempt(
        self,
        predict: Callable[[Tensor], Tensor],
        latents: Float[Tensor, "batch channels h w"],
        randomness: Randomness,
        timesteps: Int[Tensor, " batch"],
    ) -> Attempt:
        """As `errors`, with what the errors are made of.

        Source: Ho et al. 2020 (2006.11239), equation 14; Salimans & Ho (2202.00512) for v.
        """
        noise = randomness.normal("noise", tuple(latents.shape[1:]))
        alphas = self.alphas[timesteps]
        noisy = add_noise(latents, noise, alphas).contiguous(memory_format=torch.channels_last)
        prediction = predict(noisy)
        target = prediction_target(self.prediction_type, latents, noise, alphas)
        errors = functional.mse_loss(prediction.float(), target.float(), reduction="none")
        errors = errors.mean(dim=(1, 2, 3))
        return Attempt(errors, latents, noisy, prediction, self.prediction_type, alphas)

    def weights(self, timesteps: Int[Tensor, " batch"], snr_gamma: float) -> Tensor:
        """How much each sample's error counts: min-SNR weighting (2303.09556), or 1 where γ is 0."""
        if not snr_gamma:
            return torch.ones(len(timesteps), device=self.alphas.device)
        return min_snr_weights(self.prediction_type, self.alphas[timesteps], snr_gamma)


def means_in_parts(
    asked: Mapping[str, tuple[Any, ...]],
    randomness: Randomness,
    *shared: Tensor,
    rows_at_once: int | None,
) -> dict[str, float]:
    """Figures of a validation by name: of each (errors, batch, *others) that is asked the `mean_in_parts` of
    `errors(batch, randomness, *shared, *others)`."""
    return {
        name: mean_in_parts(errors, batch, randomness, *shared, *others, rows_at_once=rows_at_once)
        for name, (errors, batch, *others) in asked.items()
    }


def mean_in_parts(
    errors: Callable[..., Tensor],
    batch: dict[str, Tensor],
    randomness: Randomness,
    *others: Tensor,
    rows_at_once: int | None,
) -> float:
    """The mean of `errors(batch, randomness, *others)`, a tensor (batch,), computed of so many rows at once.
    It may be of some rows of a part only, or of none.

    Each row keeps its own randomness, so that the parts change nothing but the memory that is needed.
    """
    count = len(randomness)
    size = count if rows_at_once is None else rows_at_once
    found = []
    for start in range(0, count, size):
        some = slice(start, start + size)
        found.append(
            errors(
                {name: values[some] for name, values in batch.items()},
                randomness.of(range(count)[some]),
                *(values[some] for values in others),
            )
        )
    return torch.cat(found).mean().item()
