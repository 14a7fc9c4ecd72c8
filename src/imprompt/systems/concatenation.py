"""The paper's ablation: image tokens beside the text tokens, read by one frozen cross-attention.

Here an image can only say what the text's own keys and values read. To compare like with like, the
projection is a perceptron widened until as many parameters train as in the decoupled adapter.

Source: Ye et al. (2308.06721), section 3.2.2 (why cross-attention is decoupled) and section 4.4.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapters import create_adapter
from imprompt.bases import Base, TextStates, image_encoder_of
from imprompt.core.config import check_left_alone
from imprompt.core.errors import ImpromptError
from imprompt.data.rows import Rows
from imprompt.systems.denoising import check_same_encoders
from imprompt.systems.image_prompt import ImagePromptOptions, ImagePromptSystem


@dataclass(frozen=True, kw_only=True)
class ConcatenationOptions(ImagePromptOptions):
    """As for image prompts; `variant` is always base."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("variant", "positions", "start_from")
        check_left_alone(self, names, "concatenated tokens know only their own kind, made anew")


class ConcatenatedTokens(nn.Module):
    """image_embeds (batch, dim) to tokens (batch, tokens, width) through one hidden layer."""

    def __init__(self, embed_dim: int, hidden_dim: int, width: int, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.layers = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, num_tokens * width)
        )
        self.norm = nn.LayerNorm(width)

    def tokens(
        self, image_embeds: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch tokens width"]:
        return self.norm(self.layers(image_embeds).unflatten(1, (self.num_tokens, -1)))


def build(options: ConcatenationOptions, base: Base, columns: Rows) -> ImagePromptSystem:
    """The system for prepared data of the base variant.

    Raises:
        ImpromptError: data of another base, a base without image encoder, or fit_to_captions.
    """
    check_same_encoders(columns, base)
    if options.fit_to_captions:
        raise ImpromptError(
            "Concatenated tokens cannot be fitted to captions: fit_to_captions=false."
        )
    embed_dim = image_encoder_of(base).embed_dim
    num_tokens = options.num_tokens or 4
    decoupled = create_adapter(base.unet, feature_dim=embed_dim, num_tokens=num_tokens)
    budget = sum(parameter.numel() for parameter in decoupled.parameters())
    width = decoupled.cross_attention_dim
    module = ConcatenatedTokens(
        embed_dim, hidden_dim_for(budget, embed_dim, width, num_tokens), width, num_tokens
    )
    return ImagePromptSystem(
        base,
        module.to(base.device),
        lambda text_states, tokens: (with_tokens(text_states, tokens), None),
        dropped_features={"image_embeds": torch.zeros(1, embed_dim)},
        options=options,
    )


def with_tokens(text_states: TextStates, tokens: Float[Tensor, "batch tokens width"]) -> TextStates:
    """Texts that go on with images' tokens, as if these were words."""
    sequence = text_states.sequence
    return replace(text_states, sequence=torch.cat([sequence, tokens.to(sequence)], 1))


def hidden_dim_for(budget: int, embed_dim: int, width: int, num_tokens: int) -> int:
    """The hidden width at which `ConcatenatedTokens` has about `budget` parameters."""
    fixed = num_tokens * width + 2 * width
    per_hidden = embed_dim + 1 + num_tokens * width
    return max(1, round((budget - fixed) / per_hidden))
