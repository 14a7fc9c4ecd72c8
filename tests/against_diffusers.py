"""An adapter on a stock pipeline the way diffusers does it, to compare with."""

from collections.abc import Sequence
from typing import Any

import torch
from tiny_pipelines import Stock
from torch import Tensor

from imprompt.adapters import ImagePromptAdapter

MAX_DIFFERENCE = 1e-4  # of [0, 1]: a fortieth of one of 255 grey levels
VISIBLE = 8 / 255  # what an image prompt changes at least, or nothing would be compared


def nested(adapter: ImagePromptAdapter) -> dict[str, dict[str, Tensor]]:
    """Official layout, as diffusers takes it."""
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in adapter.state_dict().items():
        part, name = key.split(".", 1)
        parts[part][name] = tensor.clone()
    return parts


def load_there(stock: Stock, adapters: Sequence[ImagePromptAdapter]) -> None:
    """diffusers' own way. Not every pipeline has it, though every UNet has."""
    states = [nested(adapter) for adapter in adapters]
    if hasattr(stock.pipeline, "load_ip_adapter"):
        names = [""] * len(states)
        stock.pipeline.load_ip_adapter(states, names, names, image_encoder_folder=None)
    else:
        stock.pipeline.unet._load_ip_adapter_weights(states)


def draw_there(
    stock: Stock,
    negative: Sequence[Tensor] | None,
    positive: Sequence[Tensor],
    **changes: Any,
) -> Tensor:
    """One list of features per adapter, each (images, …); `negative` None for no guidance."""
    embeds = [p[None] for p in positive]
    if negative is not None:
        embeds = [torch.cat([n[None], p]) for n, p in zip(negative, embeds, strict=True)]
    if hasattr(stock.pipeline, "load_ip_adapter"):
        return stock.draw(ip_adapter_image_embeds=embeds, **changes)

    def hand_over(_, args, kwargs):
        return args, kwargs | {"added_cond_kwargs": {"image_embeds": embeds}}

    hook = stock.pipeline.unet.register_forward_pre_hook(hand_over, with_kwargs=True)
    try:
        return stock.draw(**changes)
    finally:
        hook.remove()


def tokens_of(adapter: ImagePromptAdapter, *features: Tensor, **options: Any) -> Tensor:
    """Tokens of one prompt that may have several images."""
    return adapter.tokens(*features, **options).flatten(0, 1)[None]


def check_same(actual: Tensor, expected: Tensor, bare: Tensor) -> None:
    assert (expected - bare).abs().max() > VISIBLE
    assert (actual - expected).abs().max() < MAX_DIFFERENCE
