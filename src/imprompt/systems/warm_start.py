"""A projection that begins where least squares ends.

K' and V' begin as copies of the base's K and V, which read text states. A projection whose tokens
already look like the states of the pictures' captions is therefore understood from the first step,
and a short training can spend itself on what captions do not say. The map from image embeddings to
caption states is linear regression, solved in closed form on a few thousand pairs.

Ours, not of the paper; training from it reaches the same objective.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from imprompt.adapters.projection import LinearProjection
from imprompt.bases import Base, TextStates
from imprompt.core.errors import ImpromptError
from imprompt.data.rows import Rows

NUM_PAIRS = 4096
RIDGE = 1e-3  # of the variance of the embeddings


@torch.no_grad()
def fit_to_captions(projection: LinearProjection, base: Base, columns: Rows) -> None:
    """Set a linear projection so that its tokens are like the states of the images' captions.

    Token j becomes like the state at the end of the caption (j = 0), at the end of the padding (the
    last), or evenly between. In a causal text encoder all of these have read the whole caption.

    Raises:
        ImpromptError: the data lack image embeddings or captions, or the embeddings are all alike.
    """
    columns.require(["image_embeds", "text_ids"])
    rows = columns.rows(range(min(NUM_PAIRS, len(columns))), ["image_embeds", "text_ids"])
    encoded = TextStates.join([base.encode_text(ids) for ids in rows["text_ids"].split(256)])
    states = encoded.sequence.float()
    ends = caption_ends(rows["text_ids"], base.tokenizer.eos_token_id).to(states.device)
    targets = states_after(states, ends, projection.num_tokens)
    mean, deviation = targets.mean((0, 1)), targets.std((0, 1))
    targets = ((targets - mean) / deviation).flatten(1)
    weight, bias = ridge_regression(rows["image_embeds"].float().to(targets), targets)
    projection.proj.weight.copy_(weight.T)
    projection.proj.bias.copy_(bias)
    projection.norm.weight.copy_(deviation)
    projection.norm.bias.copy_(mean)


def caption_ends(ids: Int[Tensor, "batch length"], end_id: int) -> Int[Tensor, " batch"]:
    """Where each caption ends: its first end token, or the last place of one that was cut."""
    is_end = ids == end_id
    last = ids.shape[1] - 1
    return torch.where(is_end.any(1), is_end.int().argmax(1), last)


def states_after(
    states: Float[Tensor, "batch length dim"], ends: Int[Tensor, " batch"], num_tokens: int
) -> Float[Tensor, "batch tokens dim"]:
    """`num_tokens` states of each caption, evenly spread from its end to the end of the padding."""
    room = states.shape[1] - 1 - ends[:, None]
    steps = torch.arange(num_tokens, device=states.device)
    places = ends[:, None] + room * steps // max(1, num_tokens - 1)
    return states[torch.arange(len(states), device=states.device)[:, None], places]


def ridge_regression(
    inputs: Float[Tensor, "batch input_dim"], targets: Float[Tensor, "batch output_dim"]
) -> tuple[Float[Tensor, "input_dim output_dim"], Float[Tensor, " output_dim"]]:
    """Weight and bias of the linear map with the least squared error, shrunk a little.

    Raises:
        ImpromptError: the inputs are all alike.
    """
    input_mean, target_mean = inputs.mean(0), targets.mean(0)
    centred = (inputs - input_mean).cpu().double()  # not every device has doubles
    if not centred.any():
        raise ImpromptError(
            f"The embeddings of {len(inputs)} pairs are all alike, so that nothing can be fitted by them: "
            "more pairs are needed, or an image encoder that has learned something."
        )
    covariance = centred.T @ centred
    shrinkage = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
    products = centred.T @ (targets - target_mean).cpu().double()
    weight = torch.linalg.solve(covariance + shrinkage, products).to(targets)
    return weight, target_mean - input_mean @ weight
