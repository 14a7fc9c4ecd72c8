"""A resampler reads a set of states; with positions it reads a picture."""

import pytest
import torch
from tiny_base import build_parts
from torch.nn.functional import mse_loss

from imprompt.adapters import create_adapter
from imprompt.adapters.resampler import Resampler
from imprompt.checkpoints import load_adapter, save_adapter
from imprompt.core.errors import ImpromptError

NUM_STATES, STATE_DIM = 9, 8


@pytest.fixture(scope="module")
def unet():
    return build_parts()["unet"]


def adapter_of(unet, variant, num_positions=NUM_STATES):
    return create_adapter(
        unet, variant, feature_dim=STATE_DIM, depth=1, num_positions=num_positions
    )


def features_of(adapter):
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, NUM_STATES, feature.dim, generator=draw)
        for feature in adapter.projection.features
    ]


@pytest.mark.parametrize("variant", ["plus", "instruct"])
def test_without_them_the_order_of_states_says_nothing(unet, variant):
    placed, plain = adapter_of(unet, variant), adapter_of(unet, variant, 0)
    states, *texts = features_of(placed)
    torch.testing.assert_close(plain.tokens(states, *texts), plain.tokens(states.flip(1), *texts))
    difference = placed.tokens(states, *texts) - placed.tokens(states.flip(1), *texts)
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize("variant", ["plus", "instruct"])
def test_a_file_keeps_them(unet, variant, tmp_path):
    adapter = adapter_of(unet, variant)
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    loaded = load_adapter(tmp_path / "adapter.safetensors")
    assert loaded.variant == variant
    assert loaded.projection.features[0].length == NUM_STATES
    features = features_of(adapter)
    torch.testing.assert_close(loaded.tokens(*features), adapter.tokens(*features))


def test_diffusers_has_no_place_for_them(unet, tmp_path):
    adapter = create_adapter(unet, "plus", feature_dim=STATE_DIM, num_positions=NUM_STATES)
    sites = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    with pytest.raises(ImpromptError, match="without positions"):
        save_adapter(adapter, tmp_path / "unet.safetensors", layout="diffusers", site_names=sites)


def test_another_number_of_states_is_refused(unet):
    adapter = adapter_of(unet, "plus")
    with pytest.raises(ImpromptError, match=r"hidden_states \(batch, 9, 8\); given: \(2, 4, 8\)"):
        adapter.tokens(torch.randn(2, 4, STATE_DIM))


def test_a_variant_without_resampler_has_none(unet):
    with pytest.raises(ImpromptError, match="base variant has no positions"):
        adapter_of(unet, "base")


@pytest.mark.parametrize("num_positions", [0, NUM_STATES])
def test_only_with_them_a_place_can_be_told(num_positions):
    """One of nine states is marked; in which column and row it stands is to be told."""
    torch.manual_seed(0)
    resampler = Resampler(
        STATE_DIM, 16, num_tokens=1, dim=64, num_heads=1, depth=1, num_positions=num_positions
    )
    optimizer = torch.optim.Adam(resampler.parameters(), lr=1e-3)
    losses = []
    for _ in range(400):
        place = torch.randint(NUM_STATES, (32,))
        states = 0.1 * torch.randn(32, NUM_STATES, STATE_DIM)
        states[torch.arange(32), place, 0] = 3.0
        wanted = torch.stack([place % 3 - 1.0, place // 3 - 1.0], 1)
        loss = mse_loss(resampler(states)[:, 0, :2], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    end = sum(losses[-50:]) / 50  # who cannot tell is off by two thirds, the variance of places
    assert end < 0.3 if num_positions else end > 0.6
