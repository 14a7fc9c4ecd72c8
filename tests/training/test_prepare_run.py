"""From a system's name and settings to a system: presets, seeds, and what is refused before a step."""

import pytest
import torch
from tiny_base import write_tiny_base

from imprompt.bases import load_base
from imprompt.core.errors import ImpromptError
from imprompt.data.dataset import Columns
from imprompt.data.prepare import prepare
from imprompt.training.run import prepare_run, preset_path


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny", image_encoder=True)


@pytest.fixture(scope="module")
def columns(base_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    return Columns.open(prepare("diorama:6", folder, load_base(base_folder)))


def begun(system, base_folder, columns, *settings):
    settings = ["train.steps=1", "train.validation_rows=2", *settings]
    return prepare_run(system, load_base(base_folder), columns, None, settings)[0]


@pytest.mark.parametrize("system", ["instruct", "identity", "controlnet", "t2i-adapter"])
def test_diorama_is_short_for_each_system_s_preset_there(system):
    assert preset_path("diorama", system).name == f"diorama-{system}.toml"
    assert preset_path("diorama-shipped", system).name == "diorama-shipped.toml"


def test_the_seed_decides_what_a_new_network_begins_with(base_folder, columns):
    torch.manual_seed(123)
    stream = torch.get_rng_state()
    first, again, other = (
        begun("concatenation", base_folder, columns, f"train.seed={seed}").module.state_dict()
        for seed in (5, 5, 6)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize(
    ("system", "setting"),
    [
        ("face-id", "positions=true"),
        ("concatenation", "variant=plus"),
        ("instruct-words", "drop_instruction=0.2"),
        ("instruct-words", "snr_gamma=5"),
    ],
)
def test_an_option_that_would_do_nothing_is_told(base_folder, columns, system, setting):
    with pytest.raises(ImpromptError, match=f"{setting.split('=')[0]} is .*: leave it at"):
        begun(system, base_folder, columns, f"system.{setting}")


def test_too_few_pairs_are_told_before_anything_is_fitted_to_them(base_folder, columns):
    fitted = "system.fit_to_captions=true"
    with pytest.raises(ImpromptError, match="nothing is left to train on"):
        begun("image-prompt", base_folder, columns, fitted, "train.validation_rows=6")
    with pytest.raises(ImpromptError, match="embeddings of 1 pairs are all alike"):
        begun("image-prompt", base_folder, columns, fitted, "train.validation_rows=5")
