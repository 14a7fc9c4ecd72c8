"""Tokens that learn what stands where, of a new adapter and added to a trained one."""

from dataclasses import replace

import pytest
import torch
from tiny_base import write_tiny_base

from imprompt.adapters import create_adapter
from imprompt.bases import load_base
from imprompt.checkpoints import load_adapter, save_adapter
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns
from imprompt.data.prepare import prepare
from imprompt.systems import instruct_words
from imprompt.systems.instruct_words import InstructWordsOptions
from imprompt.systems.region_tokens import Regions, cells, with_more_tokens

SMALL = InstructWordsOptions(num_tokens=3, resampler_dim=64, depth=1, region_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regions")
    write_tiny_base(folder / "base", image_encoder=True)
    prepare(
        "diorama-instruct:20", folder / "data", load_base(folder / "base"), variant="instruct-words"
    )
    return folder


@pytest.fixture
def base(folder):
    return load_base(folder / "base")


@pytest.fixture
def columns(folder):
    return Columns.open(folder / "data")


def test_a_cell_is_the_mean_of_its_patches():
    states = torch.arange(17.0)[None, :, None]  # a class token and 4 x 4 patches: 1 … 16
    assert cells(states, 4)[0, :, 0].tolist() == [3.5, 5.5, 11.5, 13.5]
    assert torch.equal(cells(states[:, 1:], 16), states[:, 1:])
    with pytest.raises(ImpromptError, match="square number"):
        cells(states, 5)
    with pytest.raises(ImpromptError, match="no square of patches"):
        cells(states[:, :15], 4)


def test_regions_are_taught_in_units_of_their_deviation():
    states = 5 + 3 * torch.randn(50, 17, 6, generator=torch.Generator().manual_seed(0))
    taught = Regions(states, 4, dim=6)(states)
    torch.testing.assert_close(taught.mean((0, 1)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(taught.std((0, 1)), torch.ones(6))
    # Rotated and scaled, nothing of six numbers is lost in six.
    found = torch.linalg.lstsq(taught.flatten(0, 1), cells(states, 4).flatten(0, 1) - 5).solution
    assert (taught.flatten(0, 1) @ found - cells(states, 4).flatten(0, 1) + 5).std() < 0.3


def train(system, columns, steps):
    batch = columns.rows(range(10), system.columns)
    optimizer = torch.optim.Adam(system.module.parameters(), lr=3e-3)
    figures = [system.validate(batch, Randomness(0, range(10)))]
    for _ in range(steps):
        loss, _ = system.loss(batch, Randomness(0, range(10)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return figures[0], system.validate(batch, Randomness(0, range(10)))


def test_words_and_regions_are_learnt_together(base, columns):
    system = instruct_words.build(SMALL, base, columns)
    assert system.adapter.num_tokens == 7
    before, after = train(system, columns, 30)
    assert after["unsaid"] < 0.7 * before["unsaid"]
    assert after["unsaid_of_regions"] < 0.7 * before["unsaid_of_regions"]


def test_an_adapter_that_grows_goes_on_saying_what_it_said(base, columns, tmp_path):
    old = create_adapter(base.unet, "instruct", feature_dim=24, num_tokens=3, resampler_dim=64)
    save_adapter(old, tmp_path / "old.safetensors", {"base_fingerprint": base.fingerprint()})
    options = replace(SMALL, start_from=str(tmp_path / "old.safetensors"))
    system = instruct_words.build(options, base, columns)
    assert system.adapter.num_tokens == 7
    for number, weights in system.adapter.site_weights.items():
        assert torch.equal(weights.to_k_ip.weight, old.site_weights[number].to_k_ip.weight)
    before, after = train(system, columns, 30)
    assert after["unsaid_of_regions"] < 0.7 * before["unsaid_of_regions"]
    assert after["unsaid"] < before["unsaid"]
    system.export(tmp_path / "grown.safetensors")
    assert load_adapter(tmp_path / "grown.safetensors").num_tokens == 7


def test_new_tokens_come_after_the_old(base):
    old = create_adapter(base.unet, "instruct", feature_dim=24, num_tokens=3, resampler_dim=64)
    grown = with_more_tokens(old, base, 4).state_dict()
    assert torch.equal(grown["image_proj.latents"][:, :3], old.state_dict()["image_proj.latents"])
    assert grown["image_proj.latents"][:, 3:].std() > 0
    del grown["image_proj.latents"]
    assert all(torch.equal(grown[name], old.state_dict()[name]) for name in grown)
