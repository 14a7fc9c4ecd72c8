"""ControlNet: a trainable copy of the denoiser's encoder that reads a map, tied in by convolutions
that begin at zero.

Source: Zhang et al. (2302.05543): section 3.1 (zero convolutions), 3.2 (copied encoder), 3.3 (half of
the prompts dropped).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from imprompt.bases import Base, Residuals, TextStates
from imprompt.bases.latent_space import pixels_per_latent
from imprompt.core.config import check_shares
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import own_randomness
from imprompt.data.rows import Rows
from imprompt.systems.control import (
    ControlSystem,
    check_control_data,
    check_shape,
    network_to_train,
)

_EMBEDDING_CHANNELS = (16, 32, 96, 256)


@dataclass(frozen=True, kw_only=True)
class ControlNetOptions:
    """What is trained. The defaults are the paper's."""

    kind: str = ""
    """Which maps it reads, a column control_KIND of the data: depth, edges, segmentation, keypoints, …"""
    drop_text: float = 0.5
    """Share of samples without their caption, so that the map is read for what it shows."""
    early_steps: bool = False
    """Draw timesteps of much noise more often (t = 1 - u³), as for a T2I-Adapter; not of the paper."""
    zero_entry: bool = True
    """Whether the map's own entry begins at zero, too. Without, a small model learns much sooner."""
    start_from: str = ""
    """Folder of a ControlNet to go on from; empty starts from the base's encoder."""

    def __post_init__(self) -> None:
        check_shares(self, ("drop_text",))


def build(options: ControlNetOptions, base: Base, columns: Rows) -> ControlSystem:
    """The system for prepared data with control maps.

    Raises:
        ImpromptError: data of another base or without these maps, or a start of another shape.
    """
    check_control_data(columns, base, options.kind)
    network = network_to_train(
        lambda: create_controlnet(base, zero_entry=options.zero_entry),
        options.start_from,
        "ControlNetModel",
        check_controlnet,
        base,
    )
    return ControlSystem(
        base,
        network,
        lambda noisy, timesteps, text_states, maps: control_residuals(
            network, base, noisy, timesteps, text_states, maps
        ),
        kind=options.kind,
        drop_text=options.drop_text,
        early_steps=options.early_steps,
    )


def check_controlnet(network: Any, base: Base) -> None:
    """Raise an ImpromptError if a ControlNet is no copy of the base's encoder in its shape."""
    own, its = base.unet.config, network.config
    check_shape(
        base,
        {"channels": tuple(its.block_out_channels), "text width": its.cross_attention_dim},
        {"channels": tuple(own.block_out_channels), "text width": own.cross_attention_dim},
    )


def create_controlnet(base: Base, *, zero_entry: bool = True, seed: int = 0) -> Any:
    """A `ControlNetModel` that begins as the copy of a base's encoder, and adds nothing yet.

    Raises:
        ImpromptError: pixels and latents differ by a factor that diffusers' class has no entry for.
    """
    from diffusers import ControlNetModel

    factor = pixels_per_latent(base.vae)
    strides = factor.bit_length() - 1
    if not 1 <= strides < len(_EMBEDDING_CHANNELS):
        raise ImpromptError(f"A ControlNet has no entry for {factor} pixels per latent.")
    with own_randomness(seed):
        model = ControlNetModel.from_unet(
            base.unet,
            conditioning_embedding_out_channels=_EMBEDDING_CHANNELS[: strides + 1],
        )
        if not zero_entry:
            nn.init.kaiming_normal_(model.controlnet_cond_embedding.conv_out.weight)
    return model


def control_residuals(
    module: Any,
    base: Base,
    noisy: Tensor,
    timesteps: Tensor | int,
    text_states: TextStates,
    maps: Tensor,
    weight: int | float = 1.0,
) -> Residuals:
    """What a ControlNet adds for noisy latents, given maps (batch, 3, height, width) in [0, 1]."""
    skips, middle = module(
        noisy,
        timesteps,
        **base.text_arguments(noisy, text_states),
        controlnet_cond=maps.to(noisy),
        conditioning_scale=weight,
        return_dict=False,
    )
    return Residuals(skips=tuple(skips), middle=middle)
