"""Learned queries that read an encoder's hidden states and leave a few tokens.

    latents ← latents + Attn(latents; [context, latents])
    latents ← latents + MLP(latents)                        (each layer; Perceiver, 2103.03206)

`Resampler` is the projection of IP-Adapter-Plus. `InstructResampler` reads three contexts in every
layer instead of one: the image, the text prompt, and the instruction that says what to take from
the image. Names of submodules are those of the published checkpoints.

A resampler sees hidden states as a set; where in the picture one stands, it knows only if the encoder
encoded it. A small encoder hardly does, and positions can be added (the authors' `apply_pos_emb`).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from imprompt.adapters.features import Feature

HEAD_DIM = 64  # of every published resampler: the number of heads follows from the weights
ADDED_LAYER_NOISE = 1e-4  # Instruct's added feed-forwards start as almost nothing


class PerceiverAttention(nn.Module):
    """Latents attend to a context and to themselves."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        inner_dim = num_heads * HEAD_DIM
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim, inner_dim * 2, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)

    def forward(
        self,
        context: Float[Tensor, "batch length dim"],
        latents: Float[Tensor, "batch queries dim"],
    ) -> Float[Tensor, "batch queries dim"]:
        latents = self.norm2(latents)
        query = self.to_q(latents)
        key, value = self.to_kv(torch.cat([self.norm1(context), latents], dim=1)).chunk(2, dim=-1)
        query, key, value = (
            x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for x in (query, key, value)
        )
        attended = scaled_dot_product_attention(query, key, value)
        return self.to_out(attended.transpose(1, 2).flatten(2))


def feed_forward(dim: int, multiplier: int = 4) -> nn.Sequential:
    """Norm, widen, GELU, narrow; without biases, as published."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * multiplier, bias=False),
        nn.GELU(),
        nn.Linear(dim * multiplier, dim, bias=False),
    )


def resampler_layers(dim: int, num_heads: int, depth: int, multiplier: int = 4) -> nn.ModuleList:
    """`depth` pairs of (attention, feed-forward)."""
    return nn.ModuleList(
        nn.ModuleList([PerceiverAttention(dim, num_heads), feed_forward(dim, multiplier)])
        for _ in range(depth)
    )


def refine(
    latents: Float[Tensor, "batch queries dim"],
    context: Float[Tensor, "batch length dim"],
    layer: nn.Module,
) -> Float[Tensor, "batch queries dim"]:
    """One pair of (attention, feed-forward) with both residuals."""
    attention, widen_and_narrow = layer.children()
    latents = latents + attention(context, latents)
    return latents + widen_and_narrow(latents)


def position_embedding(num_positions: int, feature_dim: int) -> nn.Embedding | None:
    """What is added to each hidden state for where it stands; None without positions.

    It begins at random, of deviation 1: from zero, places are learnt late or never.
    """
    return nn.Embedding(num_positions, feature_dim) if num_positions else None


def placed(
    hidden_states: Float[Tensor, "batch length feature_dim"], embedding: nn.Embedding | None
) -> Float[Tensor, "batch length feature_dim"]:
    """The hidden states with their positions, if there are any."""
    return hidden_states if embedding is None else hidden_states + embedding.weight


class Resampler(nn.Module):
    """Projection of IP-Adapter-Plus: hidden states of the image encoder → `num_tokens` tokens.

    With `num_positions` it reads so many hidden states, each with a learned position.

    Source: IP-Adapter (2308.06721), section 4.1 (fine-grained features); queries as in Flamingo.
    """

    variant = "plus"

    def __init__(
        self,
        feature_dim: int,
        cross_attention_dim: int,
        num_tokens: int = 16,
        *,
        dim: int,
        num_heads: int,
        depth: int = 4,
        num_positions: int = 0,
    ) -> None:
        super().__init__()
        states = Feature(
            "hidden_states", feature_dim, is_sequence=True, length=num_positions or None
        )
        self.features = (states,)
        self.num_tokens = num_tokens
        self.cross_attention_dim = cross_attention_dim
        self.latents = nn.Parameter(torch.randn(1, num_tokens, dim) / dim**0.5)
        self.pos_emb = position_embedding(num_positions, feature_dim)
        self.proj_in = nn.Linear(feature_dim, dim)
        self.layers = resampler_layers(dim, num_heads, depth)
        self.proj_out = nn.Linear(dim, cross_attention_dim)
        self.norm_out = nn.LayerNorm(cross_attention_dim)

    def forward(
        self, hidden_states: Float[Tensor, "batch length feature_dim"]
    ) -> Float[Tensor, "batch tokens cross_attention_dim"]:
        context = self.proj_in(placed(hidden_states, self.pos_emb))
        latents = self.latents.expand(len(context), -1, -1)
        for layer in self.layers:
            latents = refine(latents, context, layer)
        return self.norm_out(self.proj_out(latents))


class InstructResampler(nn.Module):
    """Projection of IP-Adapter-Instruct: image, instruction and text prompt → tokens.

    The instruction ("use the style", "use the object", …) and the prompt come as token states of
    the base's own text encoder. In each layer the latents read the image, then the prompt, then
    the instruction. `num_positions` as of `Resampler`.

    Source: IP-Adapter-Instruct (2408.03209), section 3.2.
    """

    variant = "instruct"

    def __init__(
        self,
        feature_dim: int,
        text_dim: int,
        cross_attention_dim: int,
        num_tokens: int = 16,
        *,
        dim: int,
        num_heads: int,
        depth: int = 4,
        num_positions: int = 0,
    ) -> None:
        super().__init__()
        self.features = (
            Feature("hidden_states", feature_dim, is_sequence=True, length=num_positions or None),
            Feature("instruction_states", text_dim, is_sequence=True),
            Feature("prompt_states", text_dim, is_sequence=True),
        )
        self.num_tokens = num_tokens
        self.cross_attention_dim = cross_attention_dim
        self.latents = nn.Parameter(torch.randn(1, num_tokens, dim) / dim**0.5)
        self.pos_emb = position_embedding(num_positions, feature_dim)
        self.proj_in = nn.Linear(feature_dim, dim)
        self.proj_prompt_input = nn.Linear(text_dim, dim)
        self.proj_new_input = nn.Linear(text_dim, dim)  # of the instruction
        self.layers = resampler_layers(dim, num_heads, depth)
        self.prompt_layers = resampler_layers(dim, num_heads, depth, multiplier=2)
        self.new_input_layers = resampler_layers(dim, num_heads, depth, multiplier=2)
        self.proj_out = nn.Linear(dim, cross_attention_dim)
        self.norm_out = nn.LayerNorm(cross_attention_dim)
        for added in (*self.prompt_layers, *self.new_input_layers):
            narrow = list(added.modules())[-1]
            assert isinstance(narrow, nn.Linear)
            nn.init.normal_(narrow.weight, std=ADDED_LAYER_NOISE)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch length feature_dim"],
        instruction_states: Float[Tensor, "batch instruction_length text_dim"],
        prompt_states: Float[Tensor, "batch prompt_length text_dim"],
    ) -> Float[Tensor, "batch tokens cross_attention_dim"]:
        image = self.proj_in(placed(hidden_states, self.pos_emb))
        prompt = self.proj_prompt_input(prompt_states)
        instruction = self.proj_new_input(instruction_states)
        latents = self.latents.expand(len(image), -1, -1)
        for of_image, of_prompt, of_instruction in zip(
            self.layers, self.prompt_layers, self.new_input_layers, strict=True
        ):
            latents = refine(latents, image, of_image)
            latents = refine(latents, prompt, of_prompt)
            latents = refine(latents, instruction, of_instruction)
        return self.norm_out(self.proj_out(latents))
