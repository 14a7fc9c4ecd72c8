"""What is named of a model hub's repository is asked for there; what is here is not."""

import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from imprompt.checkpoints import load_adapter, load_control, load_identity
from imprompt.cli.main import main
from imprompt.core.errors import ImpromptError
from imprompt.core.hub import place_on_hub
from imprompt.core.shipped import WEIGHTS


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one repository, with what the package ships; it notes what was asked for."""
    asked = []
    repository = tmp_path / "hub"

    def file(name, path):
        asked.append((name, path))
        if not (repository / path).exists():
            raise OSError("404 Client Error.\nmore of it")
        return str(repository / path)

    def snapshot(name, allow_patterns):
        asked.append((name, *allow_patterns))
        return str(repository)

    (repository / "models").mkdir(parents=True)
    shutil.copy(WEIGHTS / "diorama-ip-adapter.safetensors", repository / "models")
    shutil.copytree(WEIGHTS / "diorama-controlnet-segmentation", repository / "nets/segmentation")
    for part in (WEIGHTS / "diorama-identity").iterdir():
        copy = shutil.copytree if part.is_dir() else shutil.copy
        copy(part, repository / part.name)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_which_names_are_places_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place_on_hub("h94/IP-Adapter:models/a.bin") == ("h94/IP-Adapter", "models/a.bin")
    assert place_on_hub("InstantX/InstantID") == ("InstantX/InstantID", "")
    for other in ("diorama", "a/b/c", "/a/b", "../b", "a.safetensors", "a/b:", "C:/a"):
        assert place_on_hub(other) is None
    (tmp_path / "runs/depth").mkdir(parents=True)
    assert place_on_hub("runs/depth") is None


def test_an_adapter_of_a_repository(hub, capsys):
    name = "owner/name:models/diorama-ip-adapter.safetensors"
    assert load_adapter(name).variant == "base"
    assert hub == [("owner/name", "models/diorama-ip-adapter.safetensors")]
    with pytest.raises(
        ImpromptError, match=r"'owner/name:none' is neither here .*404 Client Error\)"
    ):
        load_adapter("owner/name:none")
    assert main(["inspect", name]) == 0
    assert "base" in capsys.readouterr().out


def test_networks_of_a_repository(hub):
    assert load_control("owner/name:nets/segmentation").kind == "segmentation"
    assert hub.pop() == (
        "owner/name",
        "nets/segmentation/*.json",
        "nets/segmentation/*.safetensors",
    )
    load_identity("owner/name")
    [asked] = hub
    assert "ip-adapter.bin" in asked and "ControlNetModel/*.safetensors" in asked


def test_an_older_network_of_a_repository(hub, tmp_path):
    """Of which there is a pickle alone."""
    folder = tmp_path / "hub/nets/segmentation"
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "diffusion_pytorch_model.bin")
    weights.unlink()
    assert load_control("owner/name:nets/segmentation").kind == "segmentation"
    assert hub[-1] == ("owner/name", "nets/segmentation/*.bin")


def test_a_single_file_is_told_how_to_become_a_control(tmp_path):
    (tmp_path / "canny.safetensors").touch()
    with pytest.raises(ImpromptError, match=r"canny.safetensors is a file.*from_single_file"):
        load_control(tmp_path / "canny.safetensors")


def test_a_file_on_a_hub_is_no_missing_file(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["diorama", "--grid", "photo.png", "--count", "1", "--columns", "1"])
    command = ["generate", "--image", "photo.png", "--num-images", "1", "--steps", "1"]
    adapter = ["--adapter", "owner/name:models/diorama-ip-adapter.safetensors"]
    assert main([*command, *adapter]) == 0
    assert main([*command, "--adapter", "models/missing.safetensors"]) == 2
    assert "no adapter models/missing.safetensors" in capsys.readouterr().err
