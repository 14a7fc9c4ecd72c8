"""What the steps of a generation share beside K' and V': the text's K and V, masks at the sites."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from imprompt.adapters.attention import (
    CONDITION_KEY,
    DecoupledAttention,
    KeyValue,
    SiteCondition,
    SiteLora,
    TextKeyValue,
    can_be_kept,
    deviates,
    own_key_value,
    version_of,
)
from imprompt.adapters.sites import Site
from imprompt.core.errors import ImpromptError

# Stable Diffusion's UNets halve the latents up to three times. Another site computes its mask.
MAX_HALVINGS = 4
# Between the aspect ratios of a mask and of the picture: sides are rounded to what the latents allow.
# Less than `attention.MAX_GRID_DEVIATION`, for here nothing has been halved and the shape is known.
MAX_PICTURE_DEVIATION = 1.1


def prepare(
    conditions: Sequence[Mapping[str, Any]],
    sites: Sequence[Site],
    processors: Mapping[int, DecoupledAttention],
    text_states: Tensor | None,
    latent_size: tuple[int, int] | None,
) -> list[dict[str, Any]]:
    """See `Handle.prepare`. What several conditions share is computed once."""
    texts: dict[tuple[int, ...], TextKeyValue | None] = {}
    masks: dict[int, Mapping[int, Tensor]] = {}

    def text_at(site: Site, loras: tuple[SiteLora, ...]) -> TextKeyValue | None:
        if text_states is None or not site.is_cross or not processors[site.index].is_plain:
            return None
        known_by = (site.index, *(id(part) for lora in loras for part in (*lora.key, *lora.value)))
        if known_by not in texts:
            texts[known_by] = text_key_value(site, text_states, loras)
        return texts[known_by]

    def with_masks(prompt: KeyValue) -> KeyValue:
        if prompt.mask is None or latent_size is None:
            return prompt
        if id(prompt.mask) not in masks:
            masks[id(prompt.mask)] = masks_by_length(prompt.mask.to(prompt.value), latent_size)
        return prompt._replace(mask_at=masks[id(prompt.mask)])

    prepared: list[dict[str, Any]] = []
    for condition in conditions:
        if CONDITION_KEY not in condition:
            raise ImpromptError("prepare() takes what handle.condition(...) or combine() returned.")
        known: Mapping[int, SiteCondition] = condition[CONDITION_KEY]
        here = {
            site.index: SiteCondition(
                tuple(with_masks(prompt) for prompt in known[site.index].prompts),
                known[site.index].loras,
                text_at(site, known[site.index].loras),
            )
            for site in sites
            if site.index in known
        }
        prepared.append({**condition, CONDITION_KEY: here})
    return prepared


def text_key_value(
    site: Site, text_states: Tensor, loras: tuple[SiteLora, ...]
) -> TextKeyValue | None:
    """K and V of the text at one site; None where every call has to compute its own."""
    if not can_be_kept(site.module):
        return None
    # Weights that are offloaded come only when the UNet is called.
    if site.module.to_k.weight.device != text_states.device:
        return None
    key, value = own_key_value(site.module, None, text_states, loras)
    return TextKeyValue(text_states, version_of(text_states), key, value)


def masks_by_length(mask: Tensor, latent_size: tuple[int, int]) -> dict[int, Tensor]:
    """A mask at each resolution that a UNet makes of latents of this size, by its positions.

    Raises:
        ImpromptError: it has another shape than the picture.
    """
    check_mask_fits(mask, latent_size)
    height, width = latent_size
    masks: dict[int, Tensor] = {}
    for _ in range(MAX_HALVINGS + 1):
        small = (
            mask
            if mask.shape[-2:] == (height, width)
            else adaptive_avg_pool2d(mask, (height, width))
        )
        masks[height * width] = small.flatten(1)
        height, width = -(-height // 2), -(-width // 2)
    return masks


def check_mask_fits(mask: Tensor, size: tuple[int, int]) -> None:
    """Raise an ImpromptError unless a mask (…, height, width) has the shape of a picture of (height, width)."""
    aspect, wanted = mask.shape[-2] / mask.shape[-1], size[0] / size[1]
    if deviates(aspect, wanted, MAX_PICTURE_DEVIATION):
        raise ImpromptError(
            f"A mask of height/width {aspect:.3f} does not fit a picture of {wanted:.3f}: give the mask the "
            "picture's aspect ratio."
        )
