"""Where adapters attach: the attention sites of a UNet, their order, and a scale for each."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat, cast

from torch import Tensor, nn

from imprompt.core.errors import ImpromptError

Number = float | int
BlockScale = Number | Sequence[Number]
Scale = Number | Sequence[Number] | Mapping[str, BlockScale | Mapping[str, BlockScale]] | Tensor

# A model family is known by the width of the text states its cross-attention reads.
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}


@dataclass(frozen=True)
class Site:
    """One attention layer of a UNet."""

    index: int  # among all attention layers: the number that official checkpoints use
    name: str  # as in `unet.named_modules()`: "mid_block.attentions.0.transformer_blocks.0.attn2"
    module: Any  # a diffusers `Attention`, known by its parts: heads, to_q, to_k, to_v, to_out, …

    @property
    def is_cross(self) -> bool:
        """Whether it reads the text."""
        return bool(self.module.is_cross_attention)

    @property
    def text_dim(self) -> int:
        """Width of what its keys and values are made of."""
        return int(self.module.to_k.in_features)

    @property
    def inner_dim(self) -> int:
        """Width of its keys and values."""
        return int(self.module.to_k.out_features)  # a quantised weight has another shape


def attention_sites(unet: nn.Module) -> list[Site]:
    """All attention layers, self-attention included, in the order of `unet.attn_processors`.

    That order is down, up, mid, not the order of execution.
    """
    # A compiled module holds the real one.
    real: nn.Module = getattr(unet, "_orig_mod", unet)
    blocks = ("down_blocks.", "up_blocks.", "mid_block.")
    modules = cast(Iterable[tuple[str, nn.Module]], real.named_modules())
    found = [
        (name, module)
        for name, module in modules
        if hasattr(module, "get_processor") and name.startswith(blocks)
    ]
    if not found:
        raise ImpromptError(
            f"{type(real).__name__} has no attention layers an image prompt could enter: "
            "a diffusers UNet2DConditionModel is needed."
        )
    return [Site(index, name, module) for index, (name, module) in enumerate(found)]


def linear_weight(layer: Any) -> Tensor:
    """The weight of a linear layer, also of one that carries a LoRA (PEFT wraps it)."""
    return getattr(layer, "base_layer", layer).weight


def family_of(cross_attention_dim: int) -> str:
    """Name of the model family whose text states have this width."""
    return FAMILIES.get(cross_attention_dim, f"unknown family (text width {cross_attention_dim})")


def scale_per_site(scale: Scale, sites: Sequence[Site]) -> list[float | Tensor]:
    """λ for each of the given cross-attention sites.

    Args:
        scale: one number for all; a sequence with one number per site, in the order of `sites`; a
            mapping from the name of a site or of a part of the UNet ("mid", "up", "up_blocks.1",
            "down_blocks.2.attentions.1", …) to a number, the longest fitting name deciding, and
            1.0 where none fits; or a tensor with one number per sample. A mapping that holds lists
            or mappings, as {"up": {"block_0": [0.0, 1.0, 0.0]}}, is diffusers' own form and means
            what it means there: a list has one number per transformer layer of its block, and what
            is not listed is 0.

    Raises:
        ImpromptError: wrong length, a name that fits no site, or what is no finite number.

    Source: of the nested form, `set_ip_adapter_scale` of diffusers.
    """
    if isinstance(scale, Tensor):
        if scale.ndim > 1:
            raise ImpromptError(
                f"scale is a tensor of shape {tuple(scale.shape)}: one number per sample is needed."
            )
        return [scale] * len(sites)
    numbers: list[Any]
    if isinstance(scale, Mapping):
        names = [site.name for site in sites]
        is_nested = any(isinstance(value, Mapping | Sequence) for value in scale.values())
        numbers = (
            named_scales(flattened(scale, names), names, unlisted=0.0)
            if is_nested
            else named_scales(cast(Mapping[str, Number], scale), names)
        )
    elif isinstance(scale, Sequence):
        numbers = list(scale)
        if len(numbers) != len(sites):
            raise ImpromptError(
                f"scale has {len(numbers)} numbers, but there are {len(sites)} cross-attention "
                f"sites: give one number, or {len(sites)}."
            )
    else:
        numbers = [scale] * len(sites)
    for number in numbers:
        if not isinstance(number, SupportsFloat) or not math.isfinite(number):
            raise ImpromptError(
                f"scale is {number!r}: a finite number is needed, usually in [0, 1]."
            )
    return [float(number) for number in numbers]


def flattened(
    scales: Mapping[str, BlockScale | Mapping[str, BlockScale]], names: Sequence[str]
) -> dict[str, Number]:
    """diffusers' nested form of scales as a flat one: a number for each name of a part."""
    flat: dict[str, Number] = {}

    def add(part: str, value: BlockScale) -> None:
        if not isinstance(value, Sequence):
            flat[part] = value
            return
        prefix = f"{part}.attentions."
        layers = sorted(
            {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
        )
        if len(value) not in (1, len(layers)):
            raise ImpromptError(
                f"scale gives {part} {len(value)} numbers, but it has {len(layers)} transformer "
                f"layers: give one number, or {len(layers)}."
            )
        values = list(value) * (len(layers) if len(value) == 1 else 1)
        flat.update({prefix + layer: one for layer, one in zip(layers, values, strict=True)})

    for part, value in scales.items():
        if isinstance(value, Mapping):
            for block, inner in value.items():
                add(f"{part}_blocks.{block.removeprefix('block_')}", inner)
        elif part in ("down", "up") and isinstance(value, Sequence):
            start = f"{part}_blocks."
            for block in sorted({name.split(".")[1] for name in names if name.startswith(start)}):
                add(start + block, value)
        else:
            add("mid_block" if part == "mid" else part, value)
    return flat


def named_scales(
    scales: Mapping[str, Number], names: Sequence[str], unlisted: Number = 1.0
) -> list[Number]:
    def fits(part: str, name: str) -> bool:
        return name == part or name.startswith((f"{part}.", f"{part}_block"))

    for part in scales:
        if not any(fits(part, name) for name in names):
            known = {"down", "mid", "up"} | {
                ".".join(name.split(".")[:depth]) for name in names for depth in range(1, 9)
            }
            nearest = difflib.get_close_matches(part, sorted(known), n=1, cutoff=0.0)[0]
            raise ImpromptError(
                f'scale names "{part}", which fits no cross-attention site of this UNet; '
                f'the nearest name is "{nearest}".'
            )
    fitting = [[part for part in scales if fits(part, name)] for name in names]
    return [scales[max(parts, key=len)] if parts else unlisted for parts in fitting]
