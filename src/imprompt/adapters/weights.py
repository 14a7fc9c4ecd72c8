"""What an adapter owns at one attention site."""

from torch import nn

from imprompt.adapters.attention import LowRank, SiteLora
from imprompt.adapters.sites import Number, Site


class LowRankLayer(nn.Module):
    """down and up of one linear layer. Up starts at zero, so a new one changes nothing."""

    def __init__(self, in_dim: int, out_dim: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_dim, rank, bias=False)
        self.up = nn.Linear(rank, out_dim, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)


class SiteWeights(nn.Module):
    """What an adapter owns at one attention site.

    Args:
        query_dim: width of the hidden states there.
        inner_dim: width of queries, keys and values.
        text_dim: width of what K and V are made of.
        is_cross: whether image prompts enter here; self-attention sites carry LoRA only.
        lora_rank: 0 for none.
    """

    def __init__(
        self, query_dim: int, inner_dim: int, text_dim: int, *, is_cross: bool, lora_rank: int = 0
    ) -> None:
        super().__init__()
        if lora_rank:
            self.to_q_lora = LowRankLayer(query_dim, inner_dim, lora_rank)
            self.to_k_lora = LowRankLayer(text_dim, inner_dim, lora_rank)
            self.to_v_lora = LowRankLayer(text_dim, inner_dim, lora_rank)
            self.to_out_lora = LowRankLayer(inner_dim, query_dim, lora_rank)
        if is_cross:
            self.to_k_ip = nn.Linear(text_dim, inner_dim, bias=False)
            self.to_v_ip = nn.Linear(text_dim, inner_dim, bias=False)
        self.is_cross = is_cross
        self.lora_rank = lora_rank

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """For comparison with a UNet's site."""
        return {name: tuple(weight.shape) for name, weight in self.named_parameters()}

    def lora(self, lora_scale: Number = 1.0) -> SiteLora:
        """The low-rank additions as tensors, the scale folded into `up`."""

        def tensors(layer: LowRankLayer) -> LowRank:
            up = layer.up.weight
            return LowRank(layer.down.weight, up if lora_scale == 1 else up * lora_scale)

        return SiteLora(
            query=tensors(self.to_q_lora),
            key=tensors(self.to_k_lora),
            value=tensors(self.to_v_lora),
            out=tensors(self.to_out_lora),
            source=self.to_q_lora.down.weight,
        )


def weights_for(site: Site, lora_rank: int = 0) -> SiteWeights:
    """Weights of the shapes that a site asks for."""
    query_dim = int(site.module.to_q.in_features)
    return SiteWeights(
        query_dim, site.inner_dim, site.text_dim, is_cross=site.is_cross, lora_rank=lora_rank
    )
