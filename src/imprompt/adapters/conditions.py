"""What a condition is made of: K' and V' of each site, checked inputs, and several joined to one."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.adapters.attention import (
    CONDITION_KEY,
    KeyValue,
    SiteCondition,
    SiteLora,
    split_heads,
)
from imprompt.adapters.sites import Scale, Site
from imprompt.adapters.weights import SiteWeights
from imprompt.core.errors import ImpromptError


def key_value(
    site: Site, weights: SiteWeights, tokens: Tensor, scale: float | Tensor, mask: Tensor | None
) -> KeyValue:
    """K' and λ·V' of one site, in heads."""
    tokens = tokens.to(weights.to_k_ip.weight)
    key = split_heads(weights.to_k_ip(tokens), site.module.heads)
    value = split_heads(weights.to_v_ip(tokens), site.module.heads)
    if site.module.norm_k is not None:  # whoever norms Q has to norm what Q is compared with
        key = site.module.norm_k(key)
    if isinstance(scale, Tensor):
        value = value * scale.to(value).reshape(-1, 1, 1, 1)
    elif scale != 1:
        value = value * scale
    return KeyValue(key, value, mask)


def differentiable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of what was made in inference mode, which torch keeps from gradients."""
    is_inference = tensor.is_inference() and not torch.is_inference_mode_enabled()
    return tensor.clone() if is_inference else tensor


def check_tokens(tokens: Tensor, width: int) -> None:
    if tokens.ndim != 3 or tokens.shape[-1] != width or 0 in tokens.shape:
        raise ImpromptError(
            f"tokens have the shape {tuple(tokens.shape)}; (batch, tokens, {width}) is needed, "
            "as adapter.tokens gives them."
        )


def check_scale(scale: Scale, num_samples: int) -> None:
    if isinstance(scale, Tensor) and scale.ndim == 1 and len(scale) != num_samples:
        raise ImpromptError(f"scale has {len(scale)} numbers for tokens of {num_samples} samples.")


def checked_zero_tokens(tokens: Tensor, zero_tokens: Tensor | None) -> Tensor:
    """Zero tokens of the tokens' shape, or an ImpromptError.

    One image's zero tokens serve for several images joined along dim 1: that softmax does not
    change when all keys are repeated equally often.
    """
    if zero_tokens is None:
        return torch.zeros_like(tokens)  # K' = V' = 0: adds nothing
    batch, length, width = tokens.shape
    fits = zero_tokens.ndim == 3 and zero_tokens.shape[-1] == width and 0 not in zero_tokens.shape
    if not fits or len(zero_tokens) not in (1, batch) or length % zero_tokens.shape[1]:
        raise ImpromptError(
            f"zero_tokens have the shape {tuple(zero_tokens.shape)}; (1 or {batch}, {length}, "
            f"{width}) is needed beside tokens of {tuple(tokens.shape)}."
        )
    zeros = zero_tokens.to(tokens).expand(batch, -1, -1)
    return zeros.repeat(1, length // zeros.shape[1], 1)


def checked_mask(mask: Tensor, num_samples: int) -> Float[Tensor, "mask_batch 1 height width"]:
    """The mask as (batch, 1, height, width) floats in [0, 1], or an ImpromptError."""
    shape = tuple(mask.shape)
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or len(mask) not in (1, num_samples) or 0 in mask.shape:
        raise ImpromptError(
            f"mask has the shape {shape}; (height, width), (1, height, width) or "
            f"({num_samples}, height, width) is needed."
        )
    if mask.dtype == torch.bool:
        mask = mask.float()
    if not mask.is_floating_point() or not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ImpromptError("mask has values outside [0, 1]: 1 where the prompt acts, 0 elsewhere.")
    return mask[:, None]


def combine(*conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Several prompts, of one adapter or of several, in one call of their UNet.

    Their image attentions add up (IP-Adapter, equation 5, with a sum over prompts). The LoRA of a
    face-id adapter acts once, however many of its prompts there are.
    """
    merged: dict[int, SiteCondition] = {}
    others: dict[str, Any] = {}
    for condition in conditions:
        if CONDITION_KEY not in condition:
            raise ImpromptError("combine() takes what handle.condition(...) returned.")
        others |= condition
        sites: Mapping[int, SiteCondition] = condition[CONDITION_KEY]
        for index, site in sites.items():
            before = merged.get(index, SiteCondition())
            merged[index] = SiteCondition(
                before.prompts + site.prompts, joined_loras(before.loras, site.loras)
            )
    return {**others, CONDITION_KEY: merged}


def joined_loras(first: tuple[SiteLora, ...], second: tuple[SiteLora, ...]) -> tuple[SiteLora, ...]:
    known = [lora.source for lora in first]
    return first + tuple(lora for lora in second if not any(lora.source is own for own in known))
