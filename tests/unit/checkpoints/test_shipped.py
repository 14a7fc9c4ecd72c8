"""What comes with the package loads, fits the embedded base, and tells nothing of where it was made."""

import json
from pathlib import Path

import diffusers
import pytest
import torch

import imprompt
from imprompt.checkpoints import inspect, load_control, shipped_controls
from imprompt.checkpoints.controls import save_network
from imprompt.checkpoints.identity import load_identity
from imprompt.core.errors import ImpromptError
from imprompt.core.shipped import ADAPTERS, CONTROLS, IDENTITIES, shipped
from imprompt.evaluation.map_reader import load_map_reader
from imprompt.evaluation.portraits import load_face_judge
from imprompt.generation.faces import face_encoder_of

WEIGHTS = Path(imprompt.__file__).parent / "weights"


@pytest.fixture(scope="module")
def base():
    return imprompt.load_base("diorama")


def test_all_of_it_loads_and_was_made_for_this_base(base):
    fingerprint = base.fingerprint()
    identity = load_identity(shipped(IDENTITIES["diorama"]))
    adapters = [
        imprompt.load_adapter(f)
        for f in (shipped(ADAPTERS["diorama"]), shipped(ADAPTERS["diorama-instruct"]))
    ]
    for adapter in (*adapters, identity.adapter):
        assert adapter.metadata["base_fingerprint"] == fingerprint
        with adapter.install(base.unet):
            pass
    assert [adapter.variant for adapter in adapters] == ["base", "instruct"]
    assert face_encoder_of(identity.adapter).name == "diorama"
    controls = shipped_controls()
    assert set(controls) == {"segmentation", "depth"}
    for kind, folder in controls.items():
        assert load_control(folder).kind == kind
        assert json.loads((folder / "control.json").read_text())["base_fingerprint"] == fingerprint
    assert load_face_judge().fingerprint() != face_encoder_of(identity.adapter).fingerprint()
    load_map_reader()


def test_it_is_had_by_name(tmp_path, monkeypatch):
    assert imprompt.load_adapter("diorama-instruct").variant == "instruct"
    assert inspect("diorama-instruct").variant == "instruct"
    assert {imprompt.load_control(f"diorama-{kind}").kind for kind in shipped_controls()} == {
        "segmentation",
        "depth",
    }
    assert [f"diorama-{kind}" for kind in sorted(shipped_controls())] == list(CONTROLS)
    assert imprompt.load_identity("diorama").adapter.variant == "plus"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "diorama").mkdir()
    with pytest.raises(ImpromptError, match="diorama is a folder"):
        imprompt.load_adapter("diorama")


def test_a_folder_that_is_no_adapter_is_called_what_it_is(tmp_path):
    for kind, name in (("segmentation", "ControlNet"), ("depth", "T2I-Adapter")):
        folder = shipped_controls()[kind]
        with pytest.raises(ImpromptError) as refused:
            inspect(folder)
        assert str(refused.value) == (
            f"{folder} is a {name} for {kind} maps, no image-prompt adapter: use it with "
            f"--control {kind}=MAP --control-model {kind}={folder}."
        )
    with pytest.raises(ImpromptError, match="is an identity, .* --identity-model"):
        inspect(shipped(IDENTITIES["diorama"]))
    (tmp_path / "control").mkdir()
    (tmp_path / "config.json").write_text("no JSON")
    with pytest.raises(ImpromptError, match=f"what it holds is {tmp_path}/control"):
        inspect(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(ImpromptError, match=f"what it holds is {tmp_path}/adapter.safetensors"):
        imprompt.load_adapter(tmp_path)


def test_no_file_names_the_place_it_was_made_at():
    files = sorted(WEIGHTS.rglob("*.json"))
    assert len(files) > 5
    for file in files:
        assert not json.loads(file.read_text()).get("_name_or_path"), file


def test_what_is_written_does_not_name_the_folder_it_was_read_from(tmp_path):
    network = diffusers.T2IAdapter(channels=[32, 32], num_res_blocks=1)
    network.save_pretrained(tmp_path / "first")
    read = load_control(tmp_path / "first").module
    save_network(read, tmp_path / "second")
    assert str(tmp_path) not in (tmp_path / "second" / "config.json").read_text()
    assert next(read.parameters()).dtype == torch.float32
    load_control(tmp_path / "second")
