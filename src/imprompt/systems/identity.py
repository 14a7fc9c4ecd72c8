"""InstantID: a person is kept, from one picture, in any pose that five landmarks ask for.

What a face encoder says of the picture becomes tokens. The denoiser reads them beside the text, as an
image prompt; and IdentityNet, a ControlNet, reads them instead of the text, with the landmarks as its
picture, so that it knows nothing but who and where. Both learn together.

Source: Wang et al. (2401.07519), section 3; no weights of the base change. No condition is dropped there;
here it can be (`drop_all`), since guidance then has a branch that was taught to know nobody.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapters import Handle, ImagePromptAdapter, add_lora, create_adapter
from imprompt.bases import Base
from imprompt.bases.latent_space import pixels_per_latent
from imprompt.checkpoints import save_adapter
from imprompt.checkpoints.controls import save_network
from imprompt.checkpoints.files import READS_FACES, READS_RAW_FACES
from imprompt.checkpoints.identity import ADAPTER_FILE, CONTROLNET_FOLDER, load_identity
from imprompt.core.config import check_range, check_shares
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.rows import Rows
from imprompt.encoders.landmarks import landmark_images
from imprompt.systems.controlnet import check_controlnet, control_residuals, create_controlnet
from imprompt.systems.denoising import (
    Attempt,
    Denoising,
    check_same_encoders,
    made_for,
    means_in_parts,
    replace_rows,
    sample_posterior,
    text_states_of,
)
from imprompt.systems.faces import learn_faces_of
from imprompt.systems.likeness import MIN_SIGNAL, Likeness, likeness_for
from imprompt.systems.protocol import Figures


@dataclass(frozen=True, kw_only=True)
class IdentityOptions:
    """What is trained. The defaults are the paper's."""

    num_tokens: int = 16
    """Tokens per face."""
    depth: int = 4
    """Layers of the resampler."""
    zero_entry: bool = True
    """Whether the landmarks' own entry begins at zero, too. Without, a small model learns sooner."""
    lora_rank: int = 0
    """Of low-rank additions at every attention layer, which face-id adapters have and InstantID has not. 0
    is none, or that of `start_from`."""
    drop_all: float = 0.0
    """Share of samples that see neither text nor face, for classifier-free guidance; landmarks stay."""
    likeness: float = 0.0
    """Weight of a second loss, that the face encoder knows the person in what is predicted. Not of the paper."""
    raw_faces: bool | None = None
    """Whether identity vectors are read as the face encoder gives them, which the published weights do and
    their pipelines take for granted, or brought to length 1. By default as `start_from` does, and raw for a
    new one."""
    start_from: str = ""
    """A folder to go on from, as `load_identity` reads it: of an earlier training, or as published (also
    "InstantX/InstantID", of the hub); empty starts anew."""

    def __post_init__(self) -> None:
        check_range(self, ("num_tokens", "depth"), 1)
        check_range(self, ("lora_rank", "likeness"), 0)
        check_shares(self, ("drop_all",))


def build(options: IdentityOptions, base: Base, columns: Rows) -> IdentitySystem:
    """The system for prepared data: `imprompt prepare … --variant identity`.

    Raises:
        ImpromptError: data of another base, or without faces; a start that does not fit.
    """
    check_same_encoders(columns, base)
    columns.require(IdentitySystem.columns)  # before its rows are read
    if options.start_from:
        start = load_identity(options.start_from)
        adapter, net = start.adapter, start.net
        check_controlnet(net, base)
    else:
        id_dim = columns.rows([0], ["id_embeds"])["id_embeds"].shape[1]
        adapter = create_adapter(
            base.unet,
            "plus",
            feature_dim=id_dim,
            num_tokens=options.num_tokens,
            depth=options.depth,
        )
        net = create_controlnet(base, zero_entry=options.zero_entry)
    if options.lora_rank and options.lora_rank != adapter.lora_rank:
        adapter = add_lora(adapter, base.unet, options.lora_rank)
    learn_faces_of(adapter, columns, options.start_from)
    _set_reading(adapter, options)
    net.float().to(base.device, memory_format=torch.channels_last).requires_grad_(True)
    system = IdentitySystem(
        base,
        adapter.to(base.device),
        net,
        drop_all=options.drop_all,
        likeness=likeness_for(columns, base, options.likeness),
    )
    columns.require(system.columns)
    return system


def _set_reading(adapter: ImagePromptAdapter, options: IdentityOptions) -> None:
    """Note in the adapter whether it reads vectors as they come."""
    own = adapter.metadata.get("reads")
    if options.raw_faces is None:
        wanted = own if options.start_from else READS_RAW_FACES
    else:
        wanted = READS_RAW_FACES if options.raw_faces else READS_FACES
    if options.start_from and wanted != own:
        raise ImpromptError(
            f"{options.start_from} reads identity vectors {'raw' if own == READS_RAW_FACES else 'of length 1'}, "
            f"and raw_faces is {str(options.raw_faces).lower()}: leave it out."
        )
    adapter.metadata["reads"] = str(wanted)


class _Together(nn.Module):
    def __init__(self, adapter: ImagePromptAdapter, identity_net: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter
        self.identity_net = identity_net


class IdentitySystem:
    """Trains adapter and IdentityNet on identity vectors and landmarks, with captions beside."""

    columns: tuple[str, ...] = (
        "latent_mean",
        "latent_logvar",
        "id_embeds",
        "landmarks",
        "text_ids",
    )
    rows_at_once: int | None = None

    def __init__(
        self,
        base: Base,
        adapter: ImagePromptAdapter,
        identity_net: Any,
        *,
        drop_all: float = 0.0,
        likeness: Likeness | None = None,
    ) -> None:
        self.base = base
        self.module = _Together(adapter, identity_net)
        self.adapter = adapter
        self._is_raw = adapter.metadata.get("reads") == READS_RAW_FACES
        if self._is_raw:
            self.columns = (*self.columns, "id_lengths")
        self._handle: Handle = adapter.install(base.unet)
        self.net = identity_net
        self._drop_all = drop_all
        self._likeness = likeness
        self._empty_ids = base.tokenize([""]).to(base.device)
        self._denoising = Denoising(base.scheduler, base.device)

    def loss(self, batch: dict[str, Tensor], randomness: Randomness) -> tuple[Tensor, Figures]:
        """The base's own loss, given the text, the face and the landmarks."""
        nothing = randomness.uniform("drop") < self._drop_all
        faces = batch["id_embeds"].float()
        batch = {
            **batch,
            "id_embeds": replace_rows(faces, torch.zeros_like(faces[:1]), nothing),
            "text_ids": replace_rows(batch["text_ids"], self._empty_ids, nothing),
        }
        timesteps = self._denoising.draw_timesteps(randomness)
        attempt = self._attempt(batch, randomness, timesteps)
        loss = attempt.errors.mean()
        if self._likeness is None:
            return loss, {}
        seen = (attempt.signal > MIN_SIGNAL) & ~nothing
        unlike = self._likeness.share(attempt.clean[seen], faces[seen], len(faces))
        figures: Figures = {"loss_of_noise": loss.detach(), "loss_of_likeness": unlike.detach()}
        return loss + self._likeness.weight * unlike, figures

    def faces(self, batch: dict[str, Tensor]) -> Float[Tensor, "batch 1 dim"]:
        """What the adapter reads of the persons: their identity vectors, raw or of length 1."""
        embeds = batch["id_embeds"].float()
        return (embeds * batch["id_lengths"] if self._is_raw else embeds)[:, None]

    def _attempt(
        self,
        batch: dict[str, Tensor],
        randomness: Randomness,
        timesteps: Tensor,
        *,
        has_adapter: bool = True,
        has_net: bool = True,
    ) -> Attempt:
        text_states = text_states_of(self.base, batch["text_ids"], batch)
        tokens = self.adapter.tokens(self.faces(batch))

        def predict(noisy: Tensor) -> Tensor:
            residuals = None
            if has_net:
                factor = pixels_per_latent(self.base.vae)
                height, width = (side * factor for side in noisy.shape[-2:])
                residuals = control_residuals(
                    self.net,
                    self.base,
                    noisy,
                    timesteps,
                    replace(text_states, sequence=tokens),
                    landmark_images(batch["landmarks"], height, width),
                )
            condition = self._handle.condition(tokens) if has_adapter else None
            return self.base.denoise(noisy, timesteps, text_states, condition, residuals)

        latents = sample_posterior(batch, randomness, self.base)
        return self._denoising.attempt(predict, latents, randomness, timesteps)

    def _errors(self, *given: Any, **parts: bool) -> Tensor:
        """The squared error of each sample's prediction, (batch,)."""
        return self._attempt(*given, **parts).errors

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        """The loss at evenly spread timesteps on fixed noise: with both, with either, with neither;
        and with another person's face."""
        count = len(batch["text_ids"])
        timesteps = self._denoising.spread_timesteps(count)
        of_faces = [name for name in ("id_embeds", "id_lengths") if name in batch]
        strangers = {
            **batch,
            **{name: batch[name].float().roll(count // 2, 0) for name in of_faces},
        }
        asked = {
            "loss": (self._errors, batch),
            "loss_without_adapter": (partial(self._errors, has_adapter=False), batch),
            "loss_without_identity_net": (partial(self._errors, has_net=False), batch),
            "loss_with_text": (partial(self._errors, has_adapter=False, has_net=False), batch),
            "loss_with_a_stranger": (self._errors, strangers),
        }
        return means_in_parts(asked, randomness, timesteps, rows_at_once=self.rows_at_once)

    def export(self, path: Path) -> None:
        """Write a folder as InstantID's: the adapter's file, and a ControlNet that diffusers loads."""
        path.mkdir(parents=True, exist_ok=True)
        metadata = made_for(self.base)
        save_adapter(self.adapter, path / ADAPTER_FILE, metadata, dtype=torch.float16)
        save_network(self.net, path / CONTROLNET_FOLDER)
        described = {"kind": "identity", **self.adapter.metadata, **metadata}
        (path / "identity.json").write_text(
            json.dumps(described, indent=2) + "\n", encoding="utf-8"
        )
