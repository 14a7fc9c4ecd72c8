"""The formula by itself, and the small geometry around masks."""

import pytest
import torch

from imprompt.adapters.attention import (
    KeyValue,
    grid_of,
    image_attention,
    join_heads,
    mask_at_site,
    repeat_to,
    split_heads,
)
from imprompt.core.errors import ImpromptError


def test_image_attention_is_softmax_attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
    torch.testing.assert_close(image_attention(query, KeyValue(key, value)), weights @ value)


def test_heads_split_and_join():
    x = torch.randn(2, 5, 12)
    assert split_heads(x, 3).shape == (2, 3, 5, 4)
    assert torch.equal(join_heads(split_heads(x, 3)), x)


@pytest.mark.parametrize(
    ("length", "aspect", "grid"),
    [
        (64, 1.0, (8, 8)),
        (64 * 96, 64 / 96, (64, 96)),
        (72, 64 / 65, (8, 9)),  # 64 x 65 latents, halved three times with rounding up
        (9 * 8, 65 / 64, (9, 8)),
        (1, 1.0, (1, 1)),
        (14 * 18, 13 / 18, (14, 18)),  # 12 x 21 is as near in height, not in shape
    ],
)
def test_grid(length, aspect, grid):
    assert grid_of(length, aspect) == grid


@pytest.mark.parametrize(("length", "aspect"), [(64, 3.0), (4, 100.0), (13, 1.0)])
def test_no_grid(length, aspect):
    with pytest.raises(ImpromptError, match="aspect ratio"):
        grid_of(length, aspect)


def test_mask_becomes_the_covered_fraction():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :3] = 1
    assert mask_at_site(mask, 4).tolist() == [[1.0, 0.5, 1.0, 0.5]]
    assert torch.equal(mask_at_site(mask, 16), mask.flatten(1))


def test_repeat_keeps_samples_apart():
    prompts = torch.arange(2.0).reshape(2, 1, 1, 1)
    assert repeat_to(prompts, 6).flatten().tolist() == [0, 1, 0, 1, 0, 1]
    with pytest.raises(ImpromptError, match="divisor of 3"):
        repeat_to(prompts, 3)
