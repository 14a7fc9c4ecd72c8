"""Image prompts that are told what to take from the image: their tokens, and the published guidance."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from imprompt.adapters import ImagePromptAdapter
from imprompt.adapters.sites import Number
from imprompt.bases import Base, TextStates
from imprompt.core.errors import ImpromptError
from imprompt.encoders.instruction import METADATA_KEY, instruction_states

EVERYTHING = "use everything"
"""What is asked for where no instruction is given."""

UNINSTRUCTED = "everything"
"""What guidance compares an instruction with, in the authors' words."""


@dataclass(frozen=True, eq=False)
class Words:
    """What an Instruct adapter needs beside the image: the base, and each image's text.

    `text_states` are what `base.instruct_states` made of the texts: one row for all images of a
    generation, or one for each. So are the `negative_texts`; None is the empty text.
    """

    base: Base
    text_states: Float[Tensor, "texts length dim"]
    negative_texts: Sequence[str] | None = None


@dataclass(frozen=True, eq=False)
class InstructedTokens:
    """An image prompt's tokens for each part of a guided batch."""

    full: Float[Tensor, "images tokens dim"]
    """image, text and instruction"""
    uninstructed: Float[Tensor, "images tokens dim"]
    """image and text, told that everything is meant"""
    image_only: Float[Tensor, "negatives tokens dim"]
    """the image, with the negative text for text and instruction"""
    nothing: Float[Tensor, "nothings tokens dim"] | None
    """no image and no instruction, with the negative text; None if that was not asked for"""


def words_of(
    base: Base,
    prompts: Sequence[str],
    text_states: TextStates,
    negative_prompts: Sequence[str | None],
) -> Words:
    """The words of a generation: its prompts, what `encode_text` made of them, its negative prompts.

    For a base with two text encoders the authors make the tokens of nothing and of the image alone of
    the empty text, whatever the negative prompt.

    Source: the published pipelines of IP-Adapter-Instruct (2408.03209).
    """
    texts = one_if_equal(prompts)
    negative_texts = None
    if any(negative_prompts) and not _has_two_text_encoders(base):
        negative_texts = one_if_equal([text or "" for text in negative_prompts])
    return Words(base, base.instruct_states(texts, text_states[: len(texts)]), negative_texts)


def instructed_tokens(
    adapter: ImagePromptAdapter,
    features: Float[Tensor, "pictures length dim"],
    nothing: Float[Tensor, "one length dim"] | None,
    instruction: str | None,
    words: Words,
    *,
    is_each: bool = False,
) -> InstructedTokens:
    """Tokens of one image prompt for all parts of guidance: of all its pictures side by side or, with
    `is_each`, of one for each image.

    `nothing` is what stands for no picture; None where nothing is guided.

    Raises:
        ImpromptError: with `is_each`, there is another number of pictures than of texts.

    Source: IP-Adapter-Instruct (2408.03209), section 3.2, and its published pipelines.
    """
    base, texts = words.base, words.text_states
    embedding = adapter.metadata.get(METADATA_KEY, "tokens")
    silent = instruction_states(base, [""], embedding)
    told_negative, negative = silent, base.instruct_states([""])
    if words.negative_texts is not None:
        told_negative = instruction_states(base, words.negative_texts, embedding)
        negative = base.instruct_states(words.negative_texts)

    def tokens(pictures: Tensor, told: Tensor, texts: Tensor) -> Tensor:
        count, images = len(pictures), len(texts)
        if is_each:
            images = max(count, images)
            return adapter.tokens(*(_for_each(x, images) for x in (pictures, told, texts)))
        made = adapter.tokens(
            pictures.repeat(images, 1, 1),
            told.expand(images, -1, -1).repeat_interleave(count, 0),
            texts.repeat_interleave(count, 0),
        )
        return made.unflatten(0, (images, count)).flatten(1, 2)

    def asked(text: str) -> Tensor:
        return tokens(features, instruction_states(base, [text], embedding), texts)

    zero = None
    if nothing is not None:
        zero = tokens(nothing, silent, negative).repeat(1, 1 if is_each else len(features), 1)
    full = asked(EVERYTHING if instruction is None else instruction)
    return InstructedTokens(
        full=full,
        # Where nothing was asked for, there is nothing for guidance to lead towards.
        uninstructed=full if instruction is None else asked(UNINSTRUCTED),
        image_only=tokens(features, told_negative, negative),
        nothing=zero,
    )


def _for_each(values: Tensor, images: int) -> Tensor:
    if len(values) not in (1, images):
        raise ImpromptError(
            f"{len(values)} pictures were given with merge='each' for {images} images: give one for each."
        )
    return values.expand(images, *values.shape[1:])


@dataclass(frozen=True)
class PublishedGuidance:
    """How the authors guide for an instruction: strengths, and what they add to λ."""

    text_scale: Number
    image_scale: Number | None
    """None: together with the text."""
    instruction_scale: Number | None
    """None: together with the text."""
    added_scale: Number


def published_guidance(instruction: str, base: Base | None = None) -> PublishedGuidance:
    """The mode that the authors' pipeline takes for an instruction, by the words in it.

    Style, colour, face and everything are guided jointly; all else by image, text and instruction
    apart. Strengths and λ are those for Stable Diffusion 1.5, where λ is lowered by 0.2 for a
    composition or a pose, unless the `base` has two text encoders, as Stable Diffusion XL.

    Source: the pipelines of IP-Adapter-Instruct (2408.03209) as published.
    """
    text = instruction.lower()
    joint = any(word in text for word in ("style", "colo", "everything", "face", "facial"))
    is_xl = base is not None and _has_two_text_encoders(base)
    lowered = not is_xl and any(word in text for word in ("composition", "pose"))
    text_scale = 5.0 if is_xl else 6.0
    return PublishedGuidance(
        text_scale=text_scale,
        image_scale=None if joint else 1.0,
        instruction_scale=None if joint else text_scale,
        added_scale=-0.2 if lowered else 0.0,
    )


def _has_two_text_encoders(base: Base) -> bool:
    return "text_encoder_2" in base.parts()


def one_if_equal(texts: Sequence[str]) -> Sequence[str]:
    """Equal texts as one, which then serves all images."""
    return texts[:1] if len(set(texts)) == 1 else texts
