"""Image prompts that are told what to take from the image: their tokens, and the published guidance."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from imprompt.adapters import ImagePromptAdapter
from imprompt.adapters.sites import Number
from imprompt.bases import Base, TextStates
from imprompt.encoders.instruction import METADATA_KEY, instruction_states

EVERYTHING = "use everything"
"""What is asked for where no instruction is given."""


@dataclass(frozen=True, eq=False)
class Words:
    """What an Instruct adapter needs beside the image: the base, and each image's text as states.

    `text_states` has one row for all images of a generation, or one for each.
    """

    base: Base
    text_states: TextStates


@dataclass(frozen=True, eq=False)
class InstructedTokens:
    """An image prompt's tokens for each part of a guided batch."""

    full: Float[Tensor, "images tokens dim"]
    """image, text and instruction"""
    uninstructed: Float[Tensor, "images tokens dim"]
    """image and text, with the instruction to use everything"""
    image_only: Float[Tensor, "one tokens dim"]
    """the image, without text and instruction"""
    nothing: Float[Tensor, "one tokens dim"] | None
    """no image, no text, no instruction; None if that was not asked for"""


def instructed_tokens(
    adapter: ImagePromptAdapter,
    features: Float[Tensor, "pictures length dim"],
    nothing: Float[Tensor, "one length dim"] | None,
    instruction: str | None,
    words: Words,
) -> InstructedTokens:
    """Tokens of one image prompt (all its pictures side by side) for all parts of guidance.

    `nothing` is what stands for no picture; None where nothing is guided.

    Source: IP-Adapter-Instruct (2408.03209), section 3.2, and its published pipelines.
    """
    embedding = adapter.metadata.get(METADATA_KEY, "tokens")
    asked, everything, silent = (
        instruction_states(words.base, [text], embedding)
        for text in (EVERYTHING if instruction is None else instruction, EVERYTHING, "")
    )
    empty = words.base.encode_text([""]).sequence

    def tokens(pictures: Tensor, told: Tensor, texts: Tensor) -> Tensor:
        count, images = len(pictures), len(texts)
        made = adapter.tokens(
            pictures.repeat(images, 1, 1),
            told.expand(count * images, -1, -1),
            texts.repeat_interleave(count, 0),
        )
        return made.unflatten(0, (images, count)).flatten(1, 2)

    texts = words.text_states.sequence
    zero = None if nothing is None else tokens(nothing, silent, empty).repeat(1, len(features), 1)
    return InstructedTokens(
        full=tokens(features, asked, texts),
        uninstructed=tokens(features, everything, texts),
        image_only=tokens(features, silent, empty),
        nothing=zero,
    )


@dataclass(frozen=True)
class Guidance:
    """How the authors guide for an instruction: strengths, and what they add to λ."""

    text_scale: Number
    image_scale: Number | None
    """None: together with the text."""
    instruction_scale: Number | None
    """None: together with the text."""
    added_scale: Number


def published_guidance(instruction: str) -> Guidance:
    """The mode that the authors' pipeline takes for an instruction, by the words in it.

    Style, colour, face and everything are guided jointly; all else by image, text and instruction
    apart. For a composition or a pose λ is lowered by 0.2.

    Source: the pipelines of IP-Adapter-Instruct (2408.03209) as published.
    """
    text = instruction.lower()
    joint = any(word in text for word in ("style", "colo", "everything", "face", "facial"))
    lowered = any(word in text for word in ("composition", "pose"))
    return Guidance(
        text_scale=6.0,
        image_scale=None if joint else 1.0,
        instruction_scale=None if joint else 6.0,
        added_scale=-0.2 if lowered else 0.0,
    )


def one_row_if_equal(states: TextStates, texts: list[str]) -> TextStates:
    """The states of equal texts as one row, which then serves all images."""
    return states[:1] if len(set(texts)) == 1 else states
