"""An adapter on a UNet: conditions for its calls, and the way back."""

from collections.abc import Generator, Mapping, Sequence
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
)
from imprompt.adapters.conditions import (
    check_scale,
    check_tokens,
    checked_mask,
    checked_zero_tokens,
    combine,
    differentiable,
    key_value,
)
from imprompt.adapters.preparation import prepare
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
            processor.holders.add(self)
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
        self._attach()
        check_tokens(tokens, self.cross_attention_dim)
        check_scale(scale, len(tokens))
        tokens = differentiable(tokens)
        scale = differentiable(scale) if isinstance(scale, Tensor) else scale
        if mask is not None:
            mask = differentiable(checked_mask(mask, len(tokens)))

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

        The calls' output stays what it was; only the work that they share is done here, once. (But
        for masks that a call by itself would lay on another grid, see `latent_size`.)
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
            latent_size: height and width of the latents, for masks at every site's resolution. A
                call by itself knows only how many positions a site has, and takes a mask to lie on
                the grid of so many that is nearest to its shape; this one is certain.

        Raises:
            ImpromptError: a mask's aspect ratio is not that of `latent_size` (a call by itself,
                which cannot know better, bears with a greater difference); no condition was given;
                or the handle was removed.
        """
        self._attach()
        return prepare(conditions, self.sites, self.processors, text_states, latent_size)

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
            layout = (sample.shape, num_parts, sample.device, sample.dtype)
            if layout not in known or torch.is_grad_enabled():
                rows = rows_of_batch(len(sample), num_parts, batch)
                here = {CONDITION_KEY: select_rows(condition, rows, sample)}
                [here] = self.prepare([here], latent_size=(sample.shape[-2], sample.shape[-1]))
                known[layout] = here[CONDITION_KEY]
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
            processor.holders.discard(self)
            if not processor.holders:
                site.module.set_processor(processor.original)
        self.processors.clear()
        self.is_installed = False

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
