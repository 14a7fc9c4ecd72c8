"""T2I-Adapter: a small network that reads a map once and adds to the encoder's features at four scales.

Source: Mou et al. (2302.08453): section 3.3 (one convolution and two residual blocks per scale), 3.4
(timesteps of much noise drawn more often).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from imprompt.bases import Base, Residuals
from imprompt.bases.latent_space import pixels_per_latent
from imprompt.core.config import check_range, check_shares
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import own_randomness
from imprompt.data.rows import Rows
from imprompt.systems.control import (
    ControlSystem,
    check_control_data,
    check_shape,
    network_to_train,
)


@dataclass(frozen=True, kw_only=True)
class T2IAdapterOptions:
    """What is trained. The defaults are the paper's."""

    kind: str = ""
    """Which maps it reads, a column control_KIND of the data: depth, edges, segmentation, keypoints, …"""
    drop_text: float = 0.0
    """Share of samples without their caption."""
    early_steps: bool = True
    """Draw timesteps of much noise more often (t = 1 - u³), since these decide the layout."""
    num_res_blocks: int = 2
    """Residual blocks per scale."""
    start_from: str = ""
    """Folder of a T2I-Adapter to go on from; empty starts anew."""

    def __post_init__(self) -> None:
        check_shares(self, ("drop_text",))
        check_range(self, ("num_res_blocks",), 1)


def build(options: T2IAdapterOptions, base: Base, columns: Rows) -> ControlSystem:
    """The system for prepared data with control maps.

    Raises:
        ImpromptError: data of another base or without these maps, or a start of another shape.
    """
    check_control_data(columns, base, options.kind)
    network = network_to_train(
        lambda: create_t2i_adapter(base, num_res_blocks=options.num_res_blocks),
        options.start_from,
        "T2IAdapter",
        check_t2i_adapter,
        base,
    )
    return ControlSystem(
        base,
        network,
        lambda noisy, timesteps, text_states, maps: adapter_residuals(network, maps),
        kind=options.kind,
        drop_text=options.drop_text,
        early_steps=options.early_steps,
    )


def check_t2i_adapter(network: Any, base: Base) -> None:
    """Raise an ImpromptError if a T2I-Adapter's features are not of the shapes that the base's encoder has."""
    its = network.config
    kind, channels = str(its.adapter_type), list(its.channels)
    # A light adapter gives maps of the very shapes that a full one does, but its last block,
    # which is as wide as the one before, is not listed.
    if kind == "light_adapter":
        kind, channels = "full_adapter", [*channels, channels[-1]]
    names = ("type", "downscaling", "channels")
    given = (kind, its.downscale_factor, channels)
    wanted = layout_of(base)
    check_shape(base, dict(zip(names, given, strict=True)), dict(zip(names, wanted, strict=True)))


def create_t2i_adapter(base: Base, *, num_res_blocks: int = 2, seed: int = 0) -> Any:
    """A `T2IAdapter` whose features fit a base's encoder.

    Raises:
        ImpromptError: diffusers has no adapter for a UNet of this shape.
    """
    from diffusers import T2IAdapter

    adapter_type, downscale_factor, channels = layout_of(base)
    with own_randomness(seed):
        return T2IAdapter(
            in_channels=3,
            channels=channels,
            num_res_blocks=num_res_blocks,
            downscale_factor=downscale_factor,
            adapter_type=adapter_type,
        )


def layout_of(base: Base) -> tuple[str, int, list[int]]:
    """The kind of `T2IAdapter` that fits a UNet: its type, its first downscaling, its channels.

    A block with attention takes a feature before it makes its picture smaller, a block without takes
    it afterwards. So Stable Diffusion 1 and 2 want each scale half as large as the one before, and
    Stable Diffusion XL (as the embedded base) two of each size, the last for the middle block.
    """
    config = base.unet.config
    channels = list(config.block_out_channels)
    size, sizes = 1.0, list[float]()
    for number, kind in enumerate(config.down_block_types):
        smaller = size if number == len(channels) - 1 else size / 2
        sizes.append(size if kind == "CrossAttnDownBlock2D" else smaller)
        size = smaller
    downscale_factor = round(pixels_per_latent(base.vae) / sizes[0])
    relative = [one / sizes[0] for one in sizes]
    if relative == [0.5**number for number in range(len(sizes))]:
        return "full_adapter", downscale_factor, channels
    if relative == [1.0, 1.0, 0.5]:
        return "full_adapter_xl", downscale_factor, [*channels, channels[-1]]
    raise ImpromptError(
        f"There is no T2I-Adapter for the UNet of {base.name}, whose encoder is of "
        f"{', '.join(config.down_block_types)}."
    )


def adapter_residuals(module: Any, maps: Tensor) -> Residuals:
    """What a T2I-Adapter adds, given maps (batch, 3, height, width) in [0, 1]; the same at every step."""
    return Residuals(encoder=tuple(module(maps.to(next(module.parameters())))))
