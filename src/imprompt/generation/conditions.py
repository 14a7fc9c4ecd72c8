"""What image prompts do at each step of a generation: their keys and values, computed once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.adapters import Handle, combine
from imprompt.adapters.sites import Number, Scale
from imprompt.core.errors import ImpromptError

# What one part of a stacked batch shows the denoiser: nothing, the image alone, image and text.
Branch = Literal["unconditional", "image_only", "conditional"]


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenPrompt:
    """An image prompt after encoder and projection: all that the denoising loop needs of it.

    `tokens` are one for all images of a generation, or one for each of them; `zero_tokens` are what
    the adapter makes of no image, for the unconditional half.

    Raises:
        ImpromptError: start and end are no time span, or the tensors do not fit each other.
    """

    handle: Handle
    tokens: Float[Tensor, "images tokens dim"]
    zero_tokens: Float[Tensor, "one tokens dim"]
    scale: Scale = 1.0
    mask: Float[Tensor, "masks height width"] | None = None
    start: Number = 0.0
    end: Number = 1.0

    def __post_init__(self) -> None:
        check_time_span(self.start, self.end)
        if self.tokens.shape[1:] != self.zero_tokens.shape[1:] or len(self.zero_tokens) != 1:
            raise ImpromptError(
                f"tokens have shape {tuple(self.tokens.shape)} and zero_tokens "
                f"{tuple(self.zero_tokens.shape)}: needed are (images, tokens, dim) and "
                "(1, tokens, dim)."
            )

    def is_active(self, step: int, num_steps: int) -> bool:
        """Whether it has any effect at this step, counted from 0."""
        return not is_zero(self.scale) and self.start <= step / num_steps < self.end


def check_time_span(start: Number, end: Number) -> None:
    """Raises an ImpromptError unless 0 <= start <= end <= 1."""
    if not 0 <= start <= end <= 1:
        raise ImpromptError(
            f"An image prompt from start={start} to end={end} is no time span: "
            "0 <= start <= end <= 1 is needed (0 is the first step, 1 after the last)."
        )


def is_zero(scale: Scale) -> bool:
    """Whether a scale is zero everywhere. A mapping never is, for what it does not list is 1."""
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
) -> list[dict[str, Any] | None]:
    """For each step what goes into `cross_attention_kwargs`; None where no prompt is active.

    `rows` says which images of the generation this batch has. K' and V' of a prompt are computed
    here, once, and only if it is active at some step.
    """
    batch = len(range(*rows.indices(num_images)))
    active_by_step = [
        tuple(j for j, prompt in enumerate(prompts) if prompt.is_active(step, num_steps))
        for step in range(num_steps)
    ]
    single = {
        j: _condition(prompts[j], branches, rows, batch, num_images)
        for j in sorted(set().union(*active_by_step))
    }
    combined = {
        active: combine(*(single[j] for j in active)) for active in set(active_by_step) if active
    }
    return [combined.get(active) for active in active_by_step]


def _condition(
    prompt: TokenPrompt, branches: Sequence[Branch], rows: slice, batch: int, num_images: int
) -> dict[str, Any]:
    tokens = _rows(prompt.tokens, rows, batch, num_images, "tokens")
    zero_tokens = prompt.zero_tokens.expand(batch, -1, -1)
    mask, scale = prompt.mask, prompt.scale
    if mask is not None and len(mask) > 1:
        mask = _rows(mask, rows, batch, num_images, "mask").repeat(len(branches), 1, 1)
    if isinstance(scale, Tensor) and scale.ndim == 1:
        scale = _rows(scale, rows, batch, num_images, "scale").repeat(len(branches))
    stacked = [zero_tokens if branch == "unconditional" else tokens for branch in branches]
    return prompt.handle.condition(torch.cat(stacked), scale=scale, mask=mask)


def _rows(values: Tensor, rows: slice, batch: int, num_images: int, what: str) -> Tensor:
    if len(values) == num_images:
        return values[rows]
    if len(values) == 1:
        return values.expand(batch, *values.shape[1:])
    raise ImpromptError(
        f"An image prompt has {what} for {len(values)} images, but {num_images} are generated: "
        f"give 1 or {num_images}."
    )
