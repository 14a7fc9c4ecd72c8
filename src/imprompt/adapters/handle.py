"""An adapter on a UNet: conditions for its calls, and the way back."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.adapters.attention import (
    CONDITION_KEY,
    DecoupledAttention,
    KeyValue,
    SiteCondition,
    SiteLora,
    split_heads,
)
from imprompt.adapters.preparation import prepare
from imprompt.adapters.sites import Number, Scale, Site, scale_per_site
from imprompt.adapters.weights import SiteWeights
from imprompt.core.errors import ImpromptError


@final
class Handle:
    """An adapter installed on a UNet, until `remove()`. Also a context manager.

    `condition` turns tokens into what the UNet is called with; a call without it is a call of the
    bare UNet, adapter or not.
    """

    def __init__(
        self, weights: Mapping[int, SiteWeights], sites: list[Site], cross_attention_dim: int
    ) -> None:
        """Made by `ImagePromptAdapter.install`, which has checked that weights and sites fit."""
        self.weights = weights
        self.sites = sites
        self.cross_attention_dim = cross_attention_dim
        self.is_installed = True
        self.processors: dict[int, DecoupledAttention] = {}
        self._attach()

    def _attach(self) -> None:
        """See that a DecoupledAttention stands at every site, also after others changed processors.

        Handles on one UNet share it. At self-attention sites it only keeps diffusers from warning
        about a keyword that the original processor does not know.
        """
        standing = {site.index: site.module.processor for site in self.sites}
        if standing == self.processors:
            return
        wanted = {
            index: processor
            if isinstance(processor, DecoupledAttention)
            else DecoupledAttention(processor, index)
            for index, processor in standing.items()
        }
        for site in self.sites:
            has_lora = site.index in self.weights and self.weights[site.index].lora_rank > 0
            if has_lora and not wanted[site.index].is_plain:
                raise ImpromptError(
                    f"{site.name} has a {type(wanted[site.index].original).__name__}, beside which "
                    "the LoRA of a face-id adapter cannot act: call "
                    "unet.set_default_attn_processor() first."
                )
        for site in self.sites:
            processor = wanted[site.index]
            if processor is not standing[site.index]:
                site.module.set_processor(processor)
            processor.holders.add(id(self))
        self.processors = wanted

    def condition(
        self,
        tokens: Float[Tensor, "batch tokens cross_attention_dim"],
        scale: Scale = 1.0,
        mask: Tensor | None = None,
        *,
        lora_scale: Number = 1.0,
        text_states: Float[Tensor, "text_batch length cross_attention_dim"] | None = None,
    ) -> dict[str, Any]:
        """What to pass as `cross_attention_kwargs`, for any number of calls with these tokens.

        K' and V' of every site are computed here, once, with gradient if gradient is enabled.
        Sample j of a UNet's batch reads tokens j modulo the number of samples given here: tokens
        for one sample serve all, and a batch repeated for classifier-free guidance stays aligned.

        Args:
            tokens: of `adapter.tokens`; several images of one prompt may be joined along dim 1.
            scale: λ; see `scale_per_site`. A site with λ = 0 computes exactly what the bare
                UNet computes, at no cost. A tensor with one number per sample lets each sample
                have its own (and then zero is computed like any other number).
            mask: where the prompt acts, in [0, 1], (batch or 1, height, width) or (height, width),
                at any resolution but with the picture's aspect ratio.
            lora_scale: weight of a face-id adapter's LoRA, which acts whatever `scale` is.
            text_states: the tensor that all calls will bring as `encoder_hidden_states`, if it is
                one: the text's K and V are then computed here as well. See `prepare`.

        Raises:
            ImpromptError: unusable tokens, scale or mask; or the handle was removed.
        """
        self._check_installed()
        width = self.cross_attention_dim
        if tokens.ndim != 3 or tokens.shape[-1] != width or 0 in tokens.shape:
            raise ImpromptError(
                f"tokens have the shape {tuple(tokens.shape)}; (batch, tokens, {width}) is needed, "
                "as adapter.tokens gives them."
            )
        if mask is not None:
            mask = checked_mask(mask, len(tokens))

        cross_sites = [site for site in self.sites if site.is_cross]
        scales = dict(
            zip((s.index for s in cross_sites), scale_per_site(scale, cross_sites), strict=True)
        )
        conditions: dict[int, SiteCondition] = {}
        for site in self.sites:
            if site.index not in self.weights:
                continue
            weights = self.weights[site.index]
            site_scale = scales.get(site.index, 0.0)
            prompts: tuple[KeyValue, ...] = ()
            loras: tuple[SiteLora, ...] = ()
            if isinstance(site_scale, Tensor) or site_scale != 0:
                prompts = (key_value(site, weights, tokens, site_scale, mask),)
            if weights.lora_rank and lora_scale != 0:
                loras = (weights.lora(lora_scale),)
            if prompts or loras:
                conditions[site.index] = SiteCondition(prompts, loras)
        condition: dict[str, Any] = {CONDITION_KEY: conditions}
        return condition if text_states is None else self.prepare([condition], text_states)[0]

    def prepare(
        self,
        conditions: Sequence[Mapping[str, Any]],
        text_states: Float[Tensor, "text_batch length cross_attention_dim"] | None = None,
        latent_size: tuple[int, int] | None = None,
    ) -> list[dict[str, Any]]:
        """The same conditions, with all computed beforehand that does not depend on the timestep.

        The calls' output stays what it was; only the work that they share is done here, once.
        Conditions of any handle on this UNet, combined ones too, may be given; what they have in
        common is computed once for all of them.

        Args:
            conditions: of `condition` or `combine`. (`combine` drops what is prepared here.)
            text_states: the tensor that calls will bring as `encoder_hidden_states`. A call that
                brings another one, equal or not, or this one after something was written into it,
                computes K and V anew. (Writes into tensors of inference mode, and any under
                `torch.compile`, go unnoticed: give another tensor instead.) So does a site whose
                layers carry a PEFT LoRA, for that may change from call to call. What is computed
                belongs to the UNet's weights as they are now, with gradient if it is enabled.
            latent_size: height and width of the latents, for masks at every site's resolution.
        """
        self._check_installed()
        return prepare(conditions, self.sites, self.processors, text_states, latent_size)

    def _check_installed(self) -> None:
        if not self.is_installed:
            raise ImpromptError("This adapter was removed from its UNet: install it again first.")
        self._attach()

    def remove(self) -> None:
        """Put back the very processors that stood there. Other adapters stay; twice is harmless."""
        for site in self.sites:
            processor = self.processors.get(site.index)
            if processor is None:
                continue
            processor.holders.discard(id(self))
            if not processor.holders and site.module.processor is processor:
                site.module.set_processor(processor.original)
        self.processors.clear()
        self.is_installed = False

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


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
        if scale.ndim == 1 and len(scale) != len(tokens):
            raise ImpromptError(
                f"scale has {len(scale)} numbers for tokens of {len(tokens)} samples."
            )
        value = value * scale.to(value).reshape(-1, 1, 1, 1)
    elif scale != 1:
        value = value * scale
    return KeyValue(key, value, mask)


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
    known = [lora.query.down for lora in first]
    return first + tuple(
        lora for lora in second if not any(lora.query.down is down for down in known)
    )
