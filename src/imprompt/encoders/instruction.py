"""What an Instruct adapter reads of an instruction: states of the base's own first text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.bases import Base
from imprompt.core.errors import ImpromptError

EMBEDDINGS = ("tokens", "pooled")
METADATA_KEY = "instruction_embedding"
"""Under which an adapter's file says how its instructions are embedded; tokens where it does not."""


def instruction_states(
    base: Base, texts: Sequence[str] | Tensor, embedding: str = "tokens"
) -> Float[Tensor, "batch length dim"]:
    """States of instructions, or of their token ids, as wide as the base's first text encoder.

    Args:
        embedding: "tokens" is a state for each token, as the published checkpoints read them;
            "pooled" is the one at the text's end, which has read all of it.

    Raises:
        ImpromptError: there is no such embedding.

    Source: IP-Adapter-Instruct (2408.03209), section 3.2.
    """
    if embedding not in EMBEDDINGS:
        raise ImpromptError(
            f"Instructions are embedded as {' or '.join(EMBEDDINGS)}, not as {embedding!r}."
        )
    ids = texts if isinstance(texts, Tensor) else base.tokenize(texts)
    ids = ids.to(base.device)
    states = base.instruct_states(ids)
    if embedding == "tokens":
        return states
    # Of a base with two text encoders the first one's ids come first, and both end at the same place.
    is_end = ids[:, : states.shape[1]] == base.tokenizer.eos_token_id
    last = torch.full((len(ids),), states.shape[1] - 1, device=ids.device)
    ends = torch.where(is_end.any(1), is_end.int().argmax(1), last)
    return states[torch.arange(len(states), device=ids.device), ends][:, None]
