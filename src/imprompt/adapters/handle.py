"""An adapter on a UNet: conditions for its calls, and the way back."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapters.attention import (
    CONDITION_KEY,
    DecoupledAttention,
    KeyValue,
    SiteCondition,
    SiteLora,
    split_heads,
)
from imprompt.adapters.prompting import parts_of_batch, rows_of_batch, select_rows
from imprompt.adapters.sites import Number, Scale, Site, scale_per_site
from imprompt.adapters.weights import SiteWeights
from imprompt.core.errors import ImpromptError


@final
class Handle:
    """An adapter installed on a UNet, until `remove()`. Also a context manager.

    `condition` turns tokens into what the UNet is called with; `prompt` does so for every call
    that a pipeline makes. A call without either is a call of the bare UNet, adapter or not.
    """

    def __init__(
        self,
        unet: nn.Module,
        weights: Mapping[int, SiteWeights],
        sites: list[Site],
        cross_attention_dim: int,
    ) -> None:
        """Made by `ImagePromptAdapter.install`, which has checked that weights and sites fit."""
        self.unet = unet
        self.weights = weights
        self.sites = sites
        self.cross_attention_dim = cross_attention_dim
        self.is_installed = True
        self.processors: dict[int, DecoupledAttention] = {}
        self._attach()

    def _attach(self) -> None:
        """See that a DecoupledAttention stands at every site, also after others changed processors.

        Handles on one UNet share it. At self-attention sites it only keeps diffusers from warning
        about a keyword that the original processor does not know. After `remove()` an error.
        """
        if not self.is_installed:
            raise ImpromptError("This adapter was removed from its UNet: install it again first.")
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

        Raises:
            ImpromptError: unusable tokens, scale or mask; or the handle was removed.
        """
        self._attach()
        check_tokens(tokens, self.cross_attention_dim)
        check_scale(scale, len(tokens))
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
        return {CONDITION_KEY: conditions}

    @contextmanager
    def prompt(
        self,
        tokens: Float[Tensor, "batch tokens cross_attention_dim"],
        zero_tokens: Float[Tensor, "zero_batch zero_tokens cross_attention_dim"] | None = None,
        scale: Scale = 1.0,
        mask: Tensor | None = None,
        *,
        lora_scale: Number = 1.0,
        guidance: bool | None = None,
    ) -> Generator[None, None, None]:
        """Give every call of the UNet this image prompt, for as long as the block runs.

            with handle.prompt(tokens, zero_tokens, scale=0.6):
                images = pipeline("a red house").images

        For stock diffusers pipelines, which know nothing of it. Classifier-free guidance is
        noticed at each call: the unconditional part reads `zero_tokens`. Prompts of blocks within
        each other add up, of one handle or of several, and with what a call's own
        `cross_attention_kwargs` bring. K' and V' are computed once, when the block begins.

        Args:
            tokens: of `adapter.tokens`: of one sample, for every image; or of several, in the
                order of the pipeline's texts (each for as many images as are drawn of its text)
                or of its images.
            zero_tokens: what the adapter makes of no image (`adapter.tokens` of zero features), or
                tokens of an image to stay away from; of one sample or of as many as `tokens`. By
                default the unconditional part reads no image at all.
            scale: λ; see `condition`. As tensor, one number per sample of `tokens`.
            mask: see `condition`.
            lora_scale: weight of a face-id adapter's LoRA.
            guidance: whether the first half of each batch is unconditional. By default a batch
                that holds the same latents twice (or thrice: perturbed-attention guidance) is
                taken so. Say False for a pipeline without guidance that draws several images from
                one and the same noise, or with perturbed-attention guidance alone.

        Raises:
            ImpromptError: unusable tokens, scale or mask; or, when the UNet is called, a batch
                that these samples cannot be shared out to; or the handle was removed meanwhile.
        """
        check_tokens(tokens, self.cross_attention_dim)
        check_scale(scale, len(tokens))
        batch, zeros = len(tokens), checked_zero_tokens(tokens, zero_tokens)
        if isinstance(scale, Tensor) and scale.ndim == 1:
            scale = torch.cat([scale, scale])
        if mask is not None:
            mask = checked_mask(mask, batch)[:, 0]
            mask = mask if len(mask) == 1 else torch.cat([mask, mask])
        both = self.condition(torch.cat([zeros, tokens]), scale, mask, lora_scale=lora_scale)
        condition: dict[int, SiteCondition] = both[CONDITION_KEY]
        known: dict[object, dict[int, SiteCondition]] = {}

        def add_prompt(
            _unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            self._attach()
            sample: Tensor = args[0] if args else kwargs["sample"]
            num_parts = parts_of_batch(sample, guidance)
            layout = (len(sample), num_parts, sample.device, sample.dtype)
            if layout not in known or torch.is_grad_enabled():
                rows = rows_of_batch(len(sample), num_parts, batch)
                known[layout] = select_rows(condition, rows, sample)
            own: dict[str, Any] = {CONDITION_KEY: known[layout]}
            given: dict[str, Any] = kwargs.get("cross_attention_kwargs") or {}
            merged = combine(given, own) if CONDITION_KEY in given else given | own
            return args, kwargs | {"cross_attention_kwargs": merged}

        if not condition:  # λ = 0: the bare model, at no cost
            yield
            return
        hook = self.unet.register_forward_pre_hook(add_prompt, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def remove(self) -> None:
        """Put back the very processors that stood there. Other adapters stay; twice is harmless."""
        for site in self.sites:
            # What stands there now: others may have put back one that this handle held earlier.
            processor = site.module.processor
            if not isinstance(processor, DecoupledAttention):
                continue
            processor.holders.discard(id(self))
            if not processor.holders:
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
        value = value * scale.to(value).reshape(-1, 1, 1, 1)
    elif scale != 1:
        value = value * scale
    return KeyValue(key, value, mask)


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
    known = [lora.query.down for lora in first]
    return first + tuple(
        lora for lora in second if not any(lora.query.down is down for down in known)
    )
