"""What ControlNet and T2I-Adapter have in common: a network beside a frozen base that obeys a map.

The base predicts noise as ever; the network reads the picture's control map and adds what it makes of
it inside the denoiser.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imprompt.bases import Base, Residuals, TextStates
from imprompt.checkpoints import load_control
from imprompt.checkpoints.controls import DESCRIPTION, save_network
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.columns import CONTROL
from imprompt.data.rows import Rows
from imprompt.systems.denoising import (
    Denoising,
    check_same_encoders,
    made_for,
    means_in_parts,
    replace_rows,
    sample_posterior,
    text_states_of,
)
from imprompt.systems.protocol import Figures

Read = Callable[[Tensor, Tensor, TextStates, Tensor], Residuals]
"""What a network adds: (noisy latents, timesteps, text states, maps in [0, 1]) → residuals."""


def check_control_data(columns: Rows, base: Base, kind: str) -> None:
    """Raise an ImpromptError unless the data are this base's and have maps of this kind."""
    check_same_encoders(columns, base)
    if not kind:
        found = [
            name.removeprefix(CONTROL)
            for name in getattr(columns, "names", ())
            if name.startswith(CONTROL)
        ]
        raise ImpromptError(
            f"Say which maps to learn: --set system.kind=KIND. {columns.path} has "
            f"{', '.join(found) or 'none; prepare it with --columns control_KIND'}."
        )
    columns.require([CONTROL + kind])


def check_shape(base: Base, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise an ImpromptError where what a network's shape is, by name, is not what the base's asks for."""
    differing = [
        f"its {name} is {given[name]}, that of {base.name} {wanted[name]}"
        for name in wanted
        if given[name] != wanted[name]
    ]
    if differing:
        raise ImpromptError(f"The control was made for another base: {'; '.join(differing)}.")


def network_to_train(
    created: Callable[[], Any],
    start_from: str,
    kind: str,
    check: Callable[[Any, Base], None],
    base: Base,
) -> Any:
    """The network of a folder, or else a new one: float32, on the base's device, ready to train.

    Raises:
        ImpromptError: the folder holds a network of another class of diffusers than `kind`, or one that `check` refuses.
    """
    if start_from:
        network: Any = load_control(start_from).module
        if type(network).__name__ != kind:
            raise ImpromptError(
                f"{start_from} holds a {type(network).__name__}; needed is a {kind}."
            )
        check(network, base)
    else:
        network = created()
    network.float().to(base.device, memory_format=torch.channels_last)
    return network.requires_grad_(True)


def as_read(network: Any, maps: Tensor) -> Tensor:
    """Maps (batch, 3, height, width) as a network reads them: grey, (batch, 1, height, width), where it sees one
    channel, as the published T2I-Adapters for edges and sketches do."""
    # A ControlNet's `in_channels` are those of the latents.
    return maps.mean(1, keepdim=True) if network.config.in_channels == 1 else maps


class ControlSystem:
    """Trains a network that turns control maps into residuals, on cached columns."""

    rows_at_once: int | None = None

    def __init__(
        self,
        base: Base,
        module: Any,
        read: Read,
        *,
        kind: str,
        drop_text: float,
        early_steps: bool = False,
    ) -> None:
        """`kind` names the maps; `drop_text` is the share of samples without their caption.

        With `early_steps` timesteps of much noise, which decide the layout, come more often.
        """
        self.base = base
        self.module = module
        self.columns = ("latent_mean", "latent_logvar", CONTROL + kind, "text_ids")
        self._read = read
        self._kind = kind
        self._drop_text = drop_text
        self._early_steps = early_steps
        self._empty_ids = base.tokenize([""]).to(base.device)
        self._denoising = Denoising(base.scheduler, base.device)

    def loss(self, batch: dict[str, Tensor], randomness: Randomness) -> tuple[Tensor, Figures]:
        """The base's own loss, with the control, on captions of which some are dropped."""
        no_text = randomness.uniform("drop text") < self._drop_text
        timesteps = self._denoising.draw_timesteps(randomness, early=self._early_steps)
        return self._errors(batch, randomness, timesteps, no_text).mean(), {}

    def _errors(
        self,
        batch: dict[str, Tensor],
        randomness: Randomness,
        timesteps: Tensor,
        no_text: Tensor,
        has_control: bool = True,
    ) -> Tensor:
        """The squared error of each sample's prediction, (batch,)."""
        text_ids = replace_rows(batch["text_ids"], self._empty_ids, no_text)
        text_states = text_states_of(self.base, text_ids, batch)

        def predict(noisy: Tensor) -> Tensor:
            residuals = None
            if has_control:
                residuals = self._read(noisy, timesteps, text_states, self.maps(batch))
            return self.base.denoise(noisy, timesteps, text_states, residuals=residuals)

        latents = sample_posterior(batch, randomness, self.base)
        return self._denoising.errors(predict, latents, randomness, timesteps)

    def maps(self, batch: dict[str, Tensor]) -> Tensor:
        """What is read: (batch, channels, height, width) in [0, 1]."""
        return as_read(self.module, batch[CONTROL + self._kind].float() / 255)

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        """The loss at evenly spread timesteps on fixed noise, with the control and without."""
        count = len(batch["text_ids"])
        timesteps = self._denoising.spread_timesteps(count)
        never = torch.zeros(count, dtype=torch.bool, device=timesteps.device)
        bare = partial(self._errors, has_control=False)
        asked = {
            "loss_with_control": (self._errors, batch, ~never),
            "loss_without_control": (bare, batch, ~never),
            "loss_with_control_and_text": (self._errors, batch, never),
            "loss_with_text": (bare, batch, never),
        }
        return means_in_parts(asked, randomness, timesteps, rows_at_once=self.rows_at_once)

    def export(self, path: Path) -> None:
        """Write a folder that diffusers' own class loads, in half precision, and what it reads."""
        save_network(self.module, path)
        described = {"kind": self._kind, **made_for(self.base)}
        (path / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
