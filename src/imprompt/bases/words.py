"""Texts as token ids: words of several vectors, and what is too long to be read."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

NUM_MARKS = 2  # of the start and the end


def token_ids(tokenizer: Any, texts: Sequence[str], length: int) -> Int[Tensor, "batch length"]:
    """Token ids between the marks of start and end, padded or cut to a length.

    A word that a textual inversion taught with several vectors stands for all of them, one after
    the other, as in diffusers' pipelines.
    """
    rows = [row[: length - NUM_MARKS] for row in _rows(tokenizer, texts)]
    marked = [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in rows]
    padding = [tokenizer.pad_token_id] * length
    return torch.tensor([(row + padding)[:length] for row in marked])


def unread_part(tokenizer: Any, text: str, length: int) -> str:
    """What of a text is beyond a length and thus never read, as the tokenizer writes it."""
    [row] = _rows(tokenizer, [text])
    return tokenizer.decode(row[length - NUM_MARKS :]).strip()


def _rows(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, however many they are."""
    vectors = _vectors_of_words(tokenizer)
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    return [[one for number in row for one in vectors.get(number, [number])] for row in rows]


def _vectors_of_words(tokenizer: Any) -> dict[int, list[int]]:
    """The ids of all vectors of a word by that of its first: `<word>`, `<word>_1`, `<word>_2`, …"""
    added = tokenizer.added_tokens_encoder
    found: dict[int, list[int]] = {}
    for word, number in added.items():
        ids = [number]
        while f"{word}_{len(ids)}" in added:
            ids.append(added[f"{word}_{len(ids)}"])
        if len(ids) > 1:
            found[number] = ids
    return found
