"""Text-to-image: the latent diffusion model that adapters are put on.

Source: Rombach et al. 2021 (2112.10752) eq. 3, with the prediction type of Salimans & Ho (2202.00512);
captions are dropped for classifier-free guidance (Ho & Salimans, 2207.12598).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from imprompt.bases import Base
from imprompt.core.config import check_range, check_shares
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.rows import Rows
from imprompt.diorama import KINDS
from imprompt.diorama.vocabulary import PERSON
from imprompt.systems.denoising import (
    Attempt,
    Denoising,
    check_same_encoders,
    means_in_parts,
    share_moved,
)
from imprompt.systems.perceptual import PortraitLook, portrait_look
from imprompt.systems.protocol import Figures, starts_from_base


def create_unet(latent_channels: int = 8, text_width: int = 128) -> Any:
    """The diorama base's denoiser over 16 × 16 latents, with attention to text at every level.

    Residual branches and the output begin at zero, which a short training rewards.
    """
    model_class: Any = UNet2DConditionModel  # its signature says less than it takes
    unet = model_class(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=(2, 4, 6),
        norm_num_groups=16,
    )
    for name, weight in unet.named_parameters():
        if name.endswith(("conv2.weight", "conv_out.weight", "proj_out.weight")):
            torch.nn.init.zeros_(weight)
    return unet


def create_scheduler() -> DDIMScheduler:
    """The noise schedule the base is trained with.

    β ends higher than Stable Diffusion's: 16 × 16 latents keep their mean colour visible longer, and what
    is visible at the last timestep is missing when sampling starts from pure noise.
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.02,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # without it diffusers' pipelines warn; trailing spacing does not read it
    )


@dataclass(frozen=True, kw_only=True)
class TextToImageOptions:
    """What is trained."""

    start: str = "new"
    """`new` for a UNet of random weights, `base` to go on with the base's."""
    drop_caption: float = 0.1
    """Share of samples that see no caption, for classifier-free guidance."""
    hold: float = 0.0
    """Weight of a loss where no person is shown: that what is predicted moves away from what the base predicts,
    so that adapters made for it keep their footing while portraits are learnt. Needs start="base" and the
    column labels, which tells persons from objects."""
    perceptual: float = 0.0
    """Weight of a loss in portraits: that to the face encoder what is predicted looks unlike the true one
    (`systems.perceptual`). Needs the column labels."""

    def __post_init__(self) -> None:
        check_shares(self, ("drop_caption",))
        check_range(self, ("hold", "perceptual"), 0)
        if self.hold and not starts_from_base(self.start):
            raise ImpromptError('hold keeps what the base predicts; it needs start="base".')


def build(options: TextToImageOptions, base: Base, columns: Rows) -> TextToImageSystem:
    """The system for columns of latents and token ids, encoded by the base.

    Raises:
        ImpromptError: data of another base, or without the labels that the options need; a start that is none.
    """
    check_same_encoders(columns, base)
    if options.hold or options.perceptual:
        columns.require(("labels",))
    return system_beside(base, options)


def system_beside(base: Base, options: TextToImageOptions) -> TextToImageSystem:
    """The system with a base's encoders, and its denoiser or a new one."""
    from_base = starts_from_base(options.start)
    before = None
    if options.hold:
        before = copy.deepcopy(base.unet).to(base.device).eval().requires_grad_(False)
    unet = (
        base.unet.requires_grad_(True)
        if from_base
        else create_unet(base.vae.config.latent_channels, base.text_encoder.config.hidden_size)
    )
    return TextToImageSystem(
        unet.to(base.device, memory_format=torch.channels_last),
        base.text_encoder,
        base.tokenize([""])[0],
        base.scheduler if from_base else create_scheduler(),
        options,
        before=before,
        look=portrait_look(base) if options.perceptual else None,
    )


class TextToImageSystem:
    """Trains a UNet on `latents` (rows, channels, h, w; unit variance) and captions.

    These are `phrasing_ids` (rows, phrasings, tokens), of which one is drawn at a time.

    `text_encoder` is frozen; `empty_ids` (tokens,) stand for a dropped caption. `before` is the denoiser that
    predictions for objects are held to, and `look` compares portraits, told apart by `labels` (rows, 4); where
    `options` say so.
    """

    rows_at_once: int | None = None

    def __init__(
        self,
        module: Any,
        text_encoder: Any,
        empty_ids: Tensor,
        scheduler: DDIMScheduler,
        options: TextToImageOptions | None = None,
        *,
        before: Any = None,
        look: PortraitLook | None = None,
    ):
        self.module = module
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.scheduler = scheduler
        self.options = TextToImageOptions() if options is None else options
        told_apart = self.options.hold or self.options.perceptual
        self.columns = ("latents", "phrasing_ids", *(("labels",) if told_apart else ()))
        self._before = before
        self._look = look
        device = next(module.parameters()).device
        self._denoising = Denoising(scheduler, device)
        self.empty_ids = empty_ids.to(device)

    def loss(self, batch: dict[str, Tensor], randomness: Randomness) -> tuple[Tensor, Figures]:
        phrasing = randomness.integers("phrasing", batch["phrasing_ids"].shape[1])
        text_ids = batch["phrasing_ids"][torch.arange(len(phrasing)), phrasing]
        dropped = randomness.uniform("drop caption") < self.options.drop_caption
        text_ids = torch.where(dropped[:, None], self.empty_ids, text_ids)
        timesteps = self._denoising.draw_timesteps(randomness)
        states = self._states(text_ids)
        attempt = self._attempt(batch, randomness, timesteps, states)
        loss = attempt.errors.mean()
        if "labels" not in self.columns:
            return loss, {}
        figures: Figures = {"loss_of_noise": loss.detach()}
        is_person = batch["labels"][:, 0] == KINDS.index(PERSON)
        if self._before is not None:
            moved = share_moved(
                attempt,
                ~is_person,
                lambda rows: (
                    self._before(attempt.noisy[rows], timesteps[rows], states[rows]).sample
                ),
            )
            loss = loss + self.options.hold * moved
            figures["loss_of_hold"] = moved.detach()
        if self._look is not None:
            unlike = self._look.share(attempt, is_person)
            loss = loss + self.options.perceptual * unlike
            figures["loss_of_portraits"] = unlike.detach()
        return loss, figures

    @torch.no_grad()
    def _states(self, text_ids: Tensor) -> Tensor:
        return self.text_encoder(input_ids=text_ids).last_hidden_state.float()

    def _attempt(
        self,
        batch: dict[str, Tensor],
        randomness: Randomness,
        timesteps: Tensor,
        states: Tensor,
    ) -> Attempt:
        return self._denoising.attempt(
            lambda noisy: self.module(noisy, timesteps, states).sample,
            batch["latents"].float(),
            randomness,
            timesteps,
        )

    def _errors(
        self,
        batch: dict[str, Tensor],
        randomness: Randomness,
        timesteps: Tensor,
        text_ids: Tensor,
    ) -> Tensor:
        """Squared error of the prediction per sample, (batch,)."""
        return self._attempt(batch, randomness, timesteps, self._states(text_ids)).errors

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        """The loss at evenly spread timesteps on fixed noise, with the caption and without."""
        text_ids = batch["phrasing_ids"][:, 0]
        timesteps = self._denoising.spread_timesteps(len(text_ids))
        asked = {
            "loss": (self._errors, batch, text_ids),
            "loss_without_text": (self._errors, batch, self.empty_ids.expand_as(text_ids)),
        }
        return means_in_parts(asked, randomness, timesteps, rows_at_once=self.rows_at_once)

    def export(self, path: Path) -> None:
        """Write `unet/` and `scheduler/` below `path` in the diffusers layout."""
        self.module.save_pretrained(path / "unet")
        self.scheduler.save_pretrained(path / "scheduler")
