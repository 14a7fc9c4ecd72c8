"""What image prompts do at each step of a generation: their keys and values, computed once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsFloat

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.adapters import Handle, combine
from imprompt.adapters.attention import CONDITION_KEY, SiteCondition
from imprompt.adapters.casting import cast_conditions
from imprompt.adapters.sites import Number, Scale
from imprompt.core.errors import ImpromptError
from imprompt.generation.explanation import Explanation

# What one part of a stacked batch shows the denoiser: tokens of nothing, of the image alone, of image
# and text told "everything", or of all as asked. The text itself it reads in the last alone, and the
# negative text in all others.
Branch = Literal["unconditional", "image_only", "uninstructed", "conditional"]


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenPrompt:
    """An image prompt after encoder and projection: all that the denoising loop needs of it.

    All tokens are one for all images of a generation, or one for each of them. `zero_tokens` are
    what the adapter makes of no image, for the unconditional half, and None where there is none.
    Where tokens depend on the text or an instruction, `image_only_tokens` are those of the image alone
    and `uninstructed_tokens` those of image and text. `lora_scale` is the weight of a face-id adapter's
    LoRA, which acts from start to end whatever λ is there.

    Raises:
        ImpromptError: start and end are no time span, or the tensors do not fit each other.
    """

    handle: Handle
    tokens: Float[Tensor, "images tokens dim"]
    zero_tokens: Float[Tensor, "zeros tokens dim"] | None
    scale: Scale = 1.0
    mask: Float[Tensor, "masks height width"] | None = None
    start: Number = 0.0
    end: Number = 1.0
    over_time: Sequence[Number] = (1.0,)
    lora_scale: Number = 1.0
    image_only_tokens: Float[Tensor, "some tokens dim"] | None = None
    uninstructed_tokens: Float[Tensor, "others tokens dim"] | None = None
    number: int | None = None
    """What an explanation calls it; by default its place among the prompts."""

    def __post_init__(self) -> None:
        check_time_span(self.start, self.end)
        check_over_time(self.over_time)
        zero = self.tokens if self.zero_tokens is None else self.zero_tokens
        if self.tokens.shape[1:] != zero.shape[1:]:
            raise ImpromptError(
                f"tokens have shape {tuple(self.tokens.shape)} and zero_tokens "
                f"{tuple(zero.shape)}: as many tokens of the same width are needed."
            )

    def is_active(self, step: int, num_steps: int) -> bool:
        """Whether it does anything at this step, counted from 0, with its tokens or with its LoRA."""
        if self.factor_at(step, num_steps) != 0:
            return True
        brings_lora = any(weights.lora_rank for weights in self.handle.weights.values())
        return self.lora_scale != 0 and brings_lora and self.start <= step / num_steps < self.end

    def factor_at(self, step: int, num_steps: int) -> float:
        """What λ is multiplied with at this step, counted from 0; 0 where the tokens do not act."""
        time = step / num_steps
        if is_zero(self.scale) or not self.start <= time < self.end:
            return 0.0
        # Of the steps from start to end the first has the first factor, the last the last.
        first, after_last = (math.ceil(time * num_steps - 1e-9) for time in (self.start, self.end))
        place = (step - first) / max(1, after_last - 1 - first) * (len(self.over_time) - 1)
        before = min(int(place), len(self.over_time) - 1)
        after = min(before + 1, len(self.over_time) - 1)
        share = place - before
        return float((1 - share) * self.over_time[before] + share * self.over_time[after])


def check_time_span(start: Number, end: Number) -> None:
    """Raises an ImpromptError unless 0 <= start <= end <= 1."""
    if not 0 <= start <= end <= 1:
        raise ImpromptError(
            f"start={start} and end={end} are no time span: "
            "0 <= start <= end <= 1 is needed (0 is the first step, 1 after the last)."
        )


def check_finite(**numbers: Number | None) -> None:
    """Raises an ImpromptError unless these are finite numbers; None is no number and passes."""
    for name, value in numbers.items():
        if value is not None and not (isinstance(value, SupportsFloat) and math.isfinite(value)):
            raise ImpromptError(f"{name} is {value!r}: a finite number is needed.")


def check_over_time(factors: Sequence[Number]) -> None:
    """Raises an ImpromptError unless these are finite numbers, one at least."""
    if not factors or not all(math.isfinite(factor) for factor in factors):
        raise ImpromptError(
            f"over_time={tuple(factors)} is no course of λ: one or more finite factors are needed."
        )


def is_zero(scale: Scale) -> bool:
    """Whether a scale is zero everywhere. A mapping counts as not, whatever is in it."""
    if isinstance(scale, Mapping):
        return False
    if isinstance(scale, Tensor):
        return not bool(scale.any())
    if isinstance(scale, Sequence):
        return not any(scale)
    return scale == 0


def conditions_by_step(
    prompts: Sequence[TokenPrompt],
    branches: Sequence[Branch],
    rows: slice,
    num_images: int,
    num_steps: int,
    explanation: Explanation | None = None,
    text_states: Tensor | None = None,
    latent_size: tuple[int, int] | None = None,
) -> list[dict[str, Any] | None]:
    """For each step what goes into `cross_attention_kwargs`; None where no prompt is active.

    `rows` says which images of the generation this batch has. K' and V' of a prompt are computed
    here, once, and only if it is active at some step. An `explanation` sees what they do. With the
    very `text_states` that every step brings to the UNet, all is as precise as these, and the text's
    K and V are computed here too, and with the `latent_size` the masks at each site.
    """
    # For each step the prompts that act, each with its factor.
    active_by_step = [
        tuple(
            (j, prompt.factor_at(step, num_steps))
            for j, prompt in enumerate(prompts)
            if prompt.is_active(step, num_steps)
        )
        for step in range(num_steps)
    ]
    single = {
        j: _condition(prompts[j], branches, rows, num_images)
        for j in sorted({j for active in active_by_step for j, _ in active})
    }
    if explanation is not None:
        single = {
            j: explanation.watch(
                condition,
                prompts[j].handle,
                j if (number := prompts[j].number) is None else number,
                rows,
            )
            for j, condition in single.items()
        }
    combined = {
        active: combine(*(weakened(single[j], factor) for j, factor in active))
        for active in set(active_by_step)
        if active
    }
    if combined:
        ready = list(combined.values())
        if text_states is not None:
            # An adapter may be more precise than its base: cast here, not at every site and step.
            ready = cast_conditions(ready, text_states)
        prepared = prompts[0].handle.prepare(ready, text_states, latent_size)
        combined = dict(zip(combined, prepared, strict=True))
    return [combined.get(active) for active in active_by_step]


def weakened(condition: dict[str, Any], factor: float) -> dict[str, Any]:
    """A condition whose image attentions count `factor` times as much; at 0 its LoRA is left."""
    if factor == 1:
        return condition
    sites: Mapping[int, SiteCondition] = condition[CONDITION_KEY]
    if factor == 0:
        left = {i: site._replace(prompts=()) for i, site in sites.items() if site.loras}
        return {**condition, CONDITION_KEY: left}
    changed = {
        index: site._replace(
            prompts=tuple(kv._replace(factor=torch.tensor(factor)) for kv in site.prompts)
        )
        for index, site in sites.items()
    }
    return {**condition, CONDITION_KEY: changed}


def _condition(
    prompt: TokenPrompt, branches: Sequence[Branch], rows: slice, num_images: int
) -> dict[str, Any]:
    def own(values: Tensor, what: str) -> Tensor:
        return rows_of(values, rows, num_images, f"An image prompt has {what}")

    tokens = own(prompt.tokens, "tokens")
    shown: dict[Branch, Tensor] = {
        "image_only": tokens,
        "uninstructed": tokens,
        "conditional": tokens,
    }
    if prompt.zero_tokens is not None:
        shown["unconditional"] = own(prompt.zero_tokens, "zero_tokens")
    elif "unconditional" in branches:
        raise ImpromptError(
            "An image prompt without zero_tokens was given: only guidance_scale=1 does without."
        )
    if prompt.image_only_tokens is not None:
        shown["image_only"] = own(prompt.image_only_tokens, "tokens")
    if prompt.uninstructed_tokens is not None:
        shown["uninstructed"] = own(prompt.uninstructed_tokens, "tokens")
    mask, scale = prompt.mask, prompt.scale
    if mask is not None and len(mask) > 1:
        mask = own(mask, "a mask").repeat(len(branches), 1, 1)
    if isinstance(scale, Tensor) and scale.ndim == 1:
        scale = own(scale, "a scale").repeat(len(branches))
    stacked = torch.cat([shown[branch] for branch in branches])
    return prompt.handle.condition(stacked, scale=scale, mask=mask, lora_scale=prompt.lora_scale)


def rows_of(values: Tensor, rows: slice, num_images: int, what: str) -> Float[Tensor, "rows ..."]:
    """Of what was given for each image, or once for all, that of some rows.

    Raises:
        ImpromptError: it was given for another number of images; it begins with `what`.
    """
    if len(values) == num_images:
        return values[rows]
    if len(values) == 1:
        return values.expand(len(range(*rows.indices(num_images))), *values.shape[1:])
    raise ImpromptError(
        f"{what} for {len(values)} images, but {num_images} are generated: give 1 or {num_images}."
    )
