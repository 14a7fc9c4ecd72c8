"""Which adapter is this? Variant from the keys alone; depth, heads and widths from the shapes."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from imprompt.adapters.adapter import VARIANTS, ImagePromptAdapter
from imprompt.adapters.projection import (
    FacePlusProjection,
    FaceProjection,
    FullProjection,
    LinearProjection,
)
from imprompt.adapters.resampler import HEAD_DIM, InstructResampler, Resampler
from imprompt.adapters.sites import family_of
from imprompt.adapters.weights import SiteWeights
from imprompt.checkpoints.messages import listed
from imprompt.checkpoints.unet_names import known_site_names
from imprompt.core.errors import ImpromptError

MAX_DEPTH = 64  # of a resampler; a larger number in a key is damage
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FILLING = ("normal", "uniform", "zero", "zeros", "ones", "fill")  # in-place functions end with "_"
POSITIONS = "image_proj.pos_emb.weight"  # of a resampler that has them
LORA_PARTS = ("to_q_lora", "to_k_lora", "to_v_lora", "to_out_lora")


class WithoutValues(TorchFunctionMode):
    """Modules made inside have shapes only: on the meta device, and not initialised, which there
    takes long and leaves nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and name.removesuffix("_").endswith(FILLING):
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        with torch.device("meta"):
            return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Deviation:
    """How a file's keys differ from those of a variant."""

    variant: str
    missing: list[str]
    unexpected: list[str]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected)


def build(
    tensors: Mapping[str, Tensor], declared_sites: Collection[int] | None = None
) -> ImagePromptAdapter:
    """The adapter whose state dict has these keys and shapes, on the meta device (no values).

    Args:
        declared_sites: numbers of the cross-attention sites, where the file tells them; else they
            are the odd numbers, as of every UNet made of transformer blocks.

    Raises:
        ImpromptError: missing or unexpected keys, which it names beside the nearest variant; or
            shapes that do not belong together.
    """
    deviation = nearest_variant(tensors, declared_sites)
    if len(deviation):
        raise ImpromptError(
            f"damaged or of an unknown kind; the nearest variant is {deviation.variant}, of which "
            f"it lacks {listed(deviation.missing)} and besides which it has "
            f"{listed(deviation.unexpected)}."
        )
    flat = [key for key, tensor in tensors.items() if tensor.ndim == 0 or 0 in tensor.shape]
    if flat:
        raise ImpromptError(f"damaged: empty tensors at {listed(flat)}.")
    odd = [f"{key} ({t.dtype})" for key, t in tensors.items() if t.dtype not in DTYPES]
    if odd:
        raise ImpromptError(
            f"damaged: weights are floating-point numbers of 16 to 64 bits, but not {listed(odd)}."
        )
    shapes = Shapes({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    try:
        with WithoutValues():
            adapter = ImagePromptAdapter(
                build_projection(deviation.variant, shapes),
                {index: build_site(shapes, index) for index in sorted(site_indexes(tensors))},
            )
    except RuntimeError:  # sizes whose product is no number any more
        raise ImpromptError("damaged: shapes that no adapter has.") from None
    wrong = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(needed.shape)}"
        for key, needed in adapter.state_dict().items()
        if needed.shape != tensors[key].shape
    ]
    if wrong:
        raise ImpromptError(f"damaged: shapes that do not belong together: {listed(wrong)}.")
    check_sites(adapter, has_declared_sites=declared_sites is not None)
    return adapter


def check_sites(adapter: ImagePromptAdapter, *, has_declared_sites: bool) -> None:
    """Raise an ImpromptError if the sites are not those of one UNet."""
    cross = {index: site for index, site in adapter.site_weights.items() if site.is_cross}
    width = adapter.cross_attention_dim
    wrong = [
        f"ip_adapter.{index} ({site.to_k_ip.in_features})"
        for index, site in cross.items()
        if site.to_k_ip.in_features != width
    ]
    if wrong:
        raise ImpromptError(
            f"damaged: tokens have the width {width}, which these sites do not read: {listed(wrong)}."
        )
    ranks = {site.lora_rank for site in adapter.site_weights.values()}
    if len(ranks) > 1:
        raise ImpromptError(f"damaged: LoRA of several ranks: {listed(sorted(map(str, ranks)))}.")
    known = [inner_dim for _, inner_dim in known_site_names(width)]
    found = [site.to_k_ip.out_features for site in cross.values()]
    if not has_declared_sites and len(found) < len(known) and found == known[: len(found)]:
        raise ImpromptError(
            f"damaged: it ends after {len(found)} of the {len(known)} cross-attention sites of "
            f"{family_of(width)}."
        )


def nearest_variant(
    keys: Iterable[str], declared_sites: Collection[int] | None = None
) -> Deviation:
    """The variant whose keys differ least, and how."""
    present = set(keys)
    sites = site_keys(present, declared_sites)
    candidates: list[Deviation] = []
    for variant in VARIANTS:
        expected = projection_keys(variant, present) | sites
        candidates.append(
            Deviation(variant, sorted(expected - present), sorted(present - expected))
        )
    return min(candidates, key=len)


def projection_keys(variant: str, present: Collection[str]) -> set[str]:
    """Keys of a variant's projection, as deep as the present keys are, taken from the very class."""
    with WithoutValues():
        projection = build_projection(variant, Shapes(dict.fromkeys(present, ())))
    return {f"image_proj.{key}" for key in projection.state_dict()}


def site_keys(present: set[str], declared_sites: Collection[int] | None = None) -> set[str]:
    """Keys that the attention sites should have, given those that are there.

    Each cross-attention site has K' and V'; and LoRA, if there is any, is at every site.
    """
    last = max(site_indexes(present), default=1)
    cross = range(1, last + 1, 2) if declared_sites is None else declared_sites
    expected = {
        f"ip_adapter.{index}.{part}.weight" for index in cross for part in ("to_k_ip", "to_v_ip")
    }
    if any("_lora." in key for key in present):
        expected |= {
            f"ip_adapter.{index}.{part}.{half}.weight"
            for index in range(last + 1)
            for part in LORA_PARTS
            for half in ("down", "up")
        }
    return expected


def site_indexes(keys: Iterable[str]) -> set[int]:
    found = (re.match(r"ip_adapter\.([0-9]{1,4})\.", key) for key in keys)
    return {int(match[1]) for match in found if match}


def depth_of(keys: Iterable[str]) -> int:
    """Number of layers of a resampler; 1 where there is none."""
    pattern = r"image_proj\.(?:perceiver_resampler\.)?layers\.([0-9]{1,4})\."
    found = [int(match[1]) for key in keys if (match := re.match(pattern, key))]
    return min(max(found, default=0) + 1, MAX_DEPTH)


class Shapes:
    """Sizes of tensors by key and axis; an axis that is not there, and a key, counts as 1."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def __call__(self, key: str, axis: int) -> int:
        shape = self.shapes.get(key, ())
        return shape[axis] if axis < len(shape) else 1

    def __contains__(self, key: str) -> bool:
        return key in self.shapes


def build_projection(variant: str, shapes: Shapes) -> nn.Module:
    """A projection of the widths that the shapes tell."""

    def size(key: str, axis: int) -> int:
        return shapes(f"image_proj.{key}", axis)

    depth = depth_of(shapes.shapes)
    if variant == "base":
        width = size("norm.weight", 0)
        return LinearProjection(size("proj.weight", 1), width, ratio(size("proj.weight", 0), width))
    if variant == "full":
        return FullProjection(size("proj.0.weight", 1), size("proj.3.weight", 0))
    if variant == "faceid":
        width = size("norm.weight", 0)
        return FaceProjection(
            size("proj.0.weight", 1), width, ratio(size("proj.2.weight", 0), width)
        )
    if variant == "faceid-plus":
        width = size("norm.weight", 0)
        return FacePlusProjection(
            size("proj.0.weight", 1),
            size("perceiver_resampler.proj_in.weight", 1),
            width,
            ratio(size("proj.2.weight", 0), width),
            num_heads=ratio(size("perceiver_resampler.layers.0.0.to_q.weight", 0), HEAD_DIM),
            depth=depth,
        )
    num_tokens, dim = size("latents", 1), size("latents", 2)
    num_heads = ratio(size("layers.0.0.to_q.weight", 0), HEAD_DIM)
    width = size("proj_out.weight", 0)
    feature_dim = size("proj_in.weight", 1)
    resampler_size = {
        "dim": dim,
        "num_heads": num_heads,
        "depth": depth,
        "num_positions": shapes(POSITIONS, 0) if POSITIONS in shapes else 0,
    }
    if variant == "plus":
        return Resampler(feature_dim, width, num_tokens, **resampler_size)
    text_dim = size("proj_new_input.weight", 1)
    return InstructResampler(feature_dim, text_dim, width, num_tokens, **resampler_size)


def ratio(whole: int, part: int) -> int:
    """How many parts; where it is not a whole number, the shapes will be found not to fit."""
    return max(1, whole // part)


def build_site(shapes: Shapes, index: int) -> SiteWeights:
    """The weights of one attention site, of the widths that the shapes tell."""

    def size(key: str, axis: int) -> int:
        return shapes(f"ip_adapter.{index}.{key}.weight", axis)

    is_cross = f"ip_adapter.{index}.to_k_ip.weight" in shapes
    if f"ip_adapter.{index}.to_q_lora.down.weight" not in shapes:
        inner_dim, text_dim = size("to_k_ip", 0), size("to_k_ip", 1)
        return SiteWeights(0, inner_dim, text_dim, is_cross=is_cross)
    return SiteWeights(
        size("to_q_lora.down", 1),
        size("to_q_lora.up", 0),
        size("to_k_lora.down", 1),
        is_cross=is_cross,
        lora_rank=size("to_q_lora.down", 0),
    )
