"""Which parts one denoised batch is stacked of, and how what they predict becomes one prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from imprompt.adapters.sites import Number
from imprompt.bases import TextStates
from imprompt.diffusion.guidance import guide, guide_by_instruction, guide_separately, rescale
from imprompt.generation.conditions import Branch


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly a generation is drawn towards what was asked for.

    Args:
        scale: towards everything at once (2207.12598); 1 is no guidance.
        image: towards the image prompts, where that shall differ; it costs a third branch.
        instruction: towards what image prompts are told, where that shall differ; it costs a fourth.
        rescaled: in [0, 1], against the overexposure of strong guidance (2305.08891, equation 16).
    """

    scale: Number = 7.5
    image: Number | None = None
    instruction: Number | None = None
    rescaled: Number = 0.0

    def branches(self, *, has_prompts: bool) -> list[Branch]:
        """The parts that each step has to compute, with image prompts or without any."""
        if self.instruction is not None:
            return ["unconditional", "image_only", "uninstructed", "conditional"]
        if self.image not in (None, self.scale) and has_prompts:
            return ["unconditional", "image_only", "conditional"]
        if self.scale != 1:
            return ["unconditional", "conditional"]
        return ["conditional"]

    def of(
        self, predictions: Float[Tensor, "stacked channels h w"], branches: Sequence[Branch]
    ) -> Float[Tensor, "batch channels h w"]:
        """One prediction of those of all branches, which stand one below the other."""
        if len(branches) == 1:
            return predictions
        unconditional, *between, conditional = predictions.chunk(len(branches))
        scale = float(self.scale)
        image = scale if self.image is None else float(self.image)
        if self.instruction is not None:
            image_only, uninstructed = between
            guided = guide_by_instruction(
                unconditional,
                image_only,
                uninstructed,
                conditional,
                scale,
                image,
                float(self.instruction),
            )
        elif between:
            guided = guide_separately(unconditional, between[0], conditional, scale, image)
        else:
            guided = guide(unconditional, conditional, scale)
        if self.rescaled > 0:
            guided = rescale(guided, conditional, float(self.rescaled))
        return guided


def stacked_text(
    text_states: TextStates, negative: TextStates | None, branches: Sequence[Branch], rows: slice
) -> TextStates:
    """What the denoiser reads in each branch, for these rows of a generation.

    `negative` is one for all images or one for each; it is needed if there are several branches.
    """
    text = text_states[rows]
    if len(branches) == 1:
        return text
    assert negative is not None
    negative = negative[rows] if len(negative) == len(text_states) else negative
    negative = negative.expand(len(text))
    read = {"conditional": text, "unconditional": negative, "image_only": negative}
    if "uninstructed" in branches:
        # As published: of Stable Diffusion XL the whole text's one state, and the sizes, stay.
        beside = TextStates(negative.sequence, text.pooled, text.framing)
        read |= {"image_only": beside, "uninstructed": beside}
    return TextStates.join([read[branch] for branch in branches])
