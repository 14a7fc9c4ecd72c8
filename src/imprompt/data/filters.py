"""Which pairs are wanted: size, aspect, length of the caption, scores, duplicates."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imprompt.core.errors import ImpromptError

DUPLICATES = ("image", "pair", "keep")
_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class Unusable(ImpromptError):
    """Why one pair cannot be used: a kind to count by, and the reason in words."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class ScoreLimit:
    """A threshold on a score that comes with the pairs, such as aesthetic>=5."""

    name: str
    comparison: str
    value: float

    @classmethod
    def parse(cls, text: str) -> ScoreLimit:
        """Of `NAME>=VALUE`, `NAME<=VALUE`, `NAME>VALUE` or `NAME<VALUE`.

        Raises:
            ImpromptError: it is written otherwise.
        """
        match = re.fullmatch(r"\s*([^<>=]+?)\s*(>=|<=|>|<)\s*([-+.\deE]+)\s*", text)
        try:
            assert match is not None
            return cls(name=match[1], comparison=match[2], value=float(match[3]))
        except (AssertionError, ValueError) as error:
            raise ImpromptError(
                f"{text!r} is no limit of a score; write for example 'aesthetic>=5' or 'punsafe<0.3'."
            ) from error

    def __str__(self) -> str:
        return f"{self.name}{self.comparison}{self.value:g}"


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What a pair must be like to be used. The defaults refuse only what cannot be trained on."""

    min_side_px: int = 16
    """Smallest width and height of the image as it is stored."""
    max_aspect: float | None = None
    """Largest ratio of the long side to the short one; the centre crop loses the rest."""
    min_caption_characters: int = 1
    max_caption_characters: int | None = None
    scores: tuple[ScoreLimit, ...] = ()
    duplicates: str = "image"
    """`image`: the first pair with the same image file stays; `pair`: only the same image with the
    same caption is a duplicate; `keep`: all stay."""

    def __post_init__(self) -> None:
        if self.duplicates not in DUPLICATES:
            raise ImpromptError(
                f"Duplicates cannot be {self.duplicates!r}; choose {', '.join(DUPLICATES)}."
            )
        if self.min_side_px < 1 or (self.max_aspect is not None and self.max_aspect < 1):
            raise ImpromptError(
                f"The smallest side is {self.min_side_px} px and the largest aspect {self.max_aspect}; "
                "both must be at least 1."
            )
        limit = self.max_caption_characters
        if limit is not None and limit < max(1, self.min_caption_characters):
            raise ImpromptError(
                f"No caption has between {self.min_caption_characters} and {limit} characters."
            )

    def described(self) -> dict[str, Any]:
        """What is kept beside the data, for people and for telling other data apart."""
        return {
            "min_side_px": self.min_side_px,
            "max_aspect": self.max_aspect,
            "min_caption_characters": self.min_caption_characters,
            "max_caption_characters": self.max_caption_characters,
            "scores": [str(limit) for limit in self.scores],
            "duplicates": self.duplicates,
        }

    def check_caption(self, text: str) -> str:
        """The caption without the space around it.

        Raises:
            Unusable: empty, too short, too long, or no text at all.
        """
        text = text.strip()
        if not text:
            raise Unusable("caption empty", "the caption is empty")
        # Half a surrogate pair: bytes that were no UTF-8, or a broken escape in JSON.
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise Unusable("caption encoding", "the caption is not UTF-8")
        if len(text) < self.min_caption_characters:
            raise Unusable(
                "caption length",
                f"the caption has {len(text)} characters; at least {self.min_caption_characters} are wanted",
            )
        if self.max_caption_characters is not None and len(text) > self.max_caption_characters:
            raise Unusable(
                "caption length",
                f"the caption has {len(text)} characters; at most {self.max_caption_characters} are wanted",
            )
        return text

    def check_scores(self, scores: Mapping[str, Any]) -> None:
        """Raise Unusable unless every score is there and within its limit."""
        for limit in self.scores:
            try:
                value = float(scores[limit.name])
            except (KeyError, TypeError, ValueError) as error:
                raise Unusable("score missing", f"it has no score {limit.name!r}") from error
            if math.isnan(value) or not _COMPARISONS[limit.comparison](value, limit.value):
                raise Unusable(
                    f"score {limit.name}", f"{limit.name} is {value:g}, wanted is {limit}"
                )

    def check_size(self, width_px: int, height_px: int) -> None:
        """Raise Unusable for images too small or too long."""
        if min(width_px, height_px) < self.min_side_px:
            raise Unusable(
                "image too small",
                f"the image is {width_px} × {height_px} px; at least {self.min_side_px} px are needed",
            )
        aspect = max(width_px, height_px) / min(width_px, height_px)
        if self.max_aspect is not None and aspect > self.max_aspect:
            raise Unusable(
                "image aspect",
                f"the image is {width_px} × {height_px} px, {aspect:.2f} : 1; at most "
                f"{self.max_aspect:g} : 1 is wanted",
            )
