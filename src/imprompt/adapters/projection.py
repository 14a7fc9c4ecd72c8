"""From what an encoder says of an image to tokens that a cross-attention can read.

One class per variant, siblings of the resamplers in `resampler.py`. All have the same face:

    variant               its name
    features              what `forward` takes, in order
    num_tokens            how many tokens come out (None: as many as go in)
    cross_attention_dim   their width

Names of submodules are those of the published checkpoints.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapters.features import Feature
from imprompt.adapters.resampler import refine, resampler_layers


@runtime_checkable
class Projection(Protocol):
    """The face that all variants share; each is an `nn.Module` besides."""

    variant: str
    features: tuple[Feature, ...]
    num_tokens: int | None
    cross_attention_dim: int


class LinearProjection(nn.Module):
    """Projection of IP-Adapter: one image embedding → a few tokens.

    Source: IP-Adapter (2308.06721), section 3.2.1: a linear layer and a layer normalisation.
    """

    variant = "base"

    def __init__(self, feature_dim: int, cross_attention_dim: int, num_tokens: int = 4) -> None:
        super().__init__()
        self.features = (Feature("image_embeds", feature_dim, is_sequence=False),)
        self.num_tokens = num_tokens
        self.cross_attention_dim = cross_attention_dim
        self.proj = nn.Linear(feature_dim, num_tokens * cross_attention_dim)
        self.norm = nn.LayerNorm(cross_attention_dim)

    def forward(
        self, image_embeds: Float[Tensor, "batch feature_dim"]
    ) -> Float[Tensor, "batch tokens cross_attention_dim"]:
        return self.norm(self.proj(image_embeds).unflatten(-1, (self.num_tokens, -1)))


class FullProjection(nn.Module):
    """Projection of IP-Adapter-Full: each hidden state of the encoder → one token."""

    variant = "full"

    def __init__(
        self, feature_dim: int, cross_attention_dim: int, num_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.features = (Feature("hidden_states", feature_dim, is_sequence=True),)
        self.num_tokens = num_tokens  # known only to who made the file: no weight depends on it
        self.cross_attention_dim = cross_attention_dim
        self.proj = nn.Sequential(
            nn.Linear(feature_dim, feature_dim),
            nn.GELU(),
            nn.Linear(feature_dim, cross_attention_dim),
            nn.LayerNorm(cross_attention_dim),
        )

    def forward(
        self, hidden_states: Float[Tensor, "batch tokens feature_dim"]
    ) -> Float[Tensor, "batch tokens cross_attention_dim"]:
        return self.proj(hidden_states)


class FaceProjection(nn.Module):
    """Projection of the face-id adapter: the embedding of a face recogniser → a few tokens."""

    variant = "faceid"

    def __init__(self, id_dim: int, cross_attention_dim: int, num_tokens: int = 4) -> None:
        super().__init__()
        self.features = (Feature("id_embeds", id_dim, is_sequence=False),)
        self.num_tokens = num_tokens
        self.cross_attention_dim = cross_attention_dim
        self.proj = face_mlp(id_dim, num_tokens * cross_attention_dim)
        self.norm = nn.LayerNorm(cross_attention_dim)

    def forward(
        self, id_embeds: Float[Tensor, "batch id_dim"]
    ) -> Float[Tensor, "batch tokens cross_attention_dim"]:
        return self.norm(self.proj(id_embeds).unflatten(-1, (self.num_tokens, -1)))


class FacePlusProjection(nn.Module):
    """Projection of face-id-plus: tokens of the identity, refined by what the image encoder saw.

    The first generation returns the refined tokens; the second ("v2") adds them to the tokens of
    the identity, with a weight. The weights do not tell the two apart, so a projection is told
    its generation by `shortcut`, which a call may override.
    """

    variant = "faceid-plus"

    def __init__(
        self,
        id_dim: int,
        feature_dim: int,
        cross_attention_dim: int,
        num_tokens: int = 4,
        *,
        num_heads: int,
        depth: int = 4,
    ) -> None:
        super().__init__()
        self.features = (
            Feature("id_embeds", id_dim, is_sequence=False),
            Feature("hidden_states", feature_dim, is_sequence=True),
        )
        self.num_tokens = num_tokens
        self.cross_attention_dim = cross_attention_dim
        self.proj = face_mlp(id_dim, num_tokens * cross_attention_dim)
        self.norm = nn.LayerNorm(cross_attention_dim)
        self.shortcut = False
        self.perceiver_resampler = FaceResampler(feature_dim, cross_attention_dim, num_heads, depth)

    def forward(
        self,
        id_embeds: Float[Tensor, "batch id_dim"],
        hidden_states: Float[Tensor, "batch length feature_dim"],
        *,
        shortcut: bool | None = None,
        shortcut_scale: float = 1.0,
    ) -> Float[Tensor, "batch tokens cross_attention_dim"]:
        identity = self.norm(self.proj(id_embeds).unflatten(-1, (self.num_tokens, -1)))
        refined = self.perceiver_resampler(identity, hidden_states)
        if shortcut is None:
            shortcut = self.shortcut
        return identity + shortcut_scale * refined if shortcut else refined


class FaceResampler(nn.Module):
    """A resampler whose queries are given: the tokens of an identity."""

    def __init__(self, feature_dim: int, dim: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(feature_dim, dim)
        self.layers = resampler_layers(dim, num_heads, depth)
        self.proj_out = nn.Linear(dim, dim)
        self.norm_out = nn.LayerNorm(dim)

    def forward(
        self,
        latents: Float[Tensor, "batch tokens dim"],
        hidden_states: Float[Tensor, "batch length feature_dim"],
    ) -> Float[Tensor, "batch tokens dim"]:
        context = self.proj_in(hidden_states)
        for layer in self.layers:
            latents = refine(latents, context, layer)
        return self.norm_out(self.proj_out(latents))


def face_mlp(id_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(id_dim, id_dim * 2), nn.GELU(), nn.Linear(id_dim * 2, out_dim))
