"""The measurement of persons kept: by an identity with its IdentityNet, and by a face-id adapter alone."""

import json
from itertools import pairwise

import pytest
import torch
from PIL import Image

from imprompt.adapters import create_adapter
from imprompt.bases import load_base
from imprompt.checkpoints import load_identity, save_adapter
from imprompt.cli.main import main
from imprompt.core.shipped import ADAPTERS, IDENTITIES, shipped
from imprompt.diorama import gallery
from imprompt.encoders.face import load_face_encoder
from imprompt.evaluation import portraits
from imprompt.evaluation.identity import (
    ABLATIONS,
    draw_identity,
    load_person,
    measure_identity,
)
from imprompt.evaluation.measure import Sampling

COUNT = 2
SAMPLING = Sampling(steps=1, guidance_scale=2.0)


@pytest.fixture(scope="module")
def base():
    return load_base("diorama")


@pytest.fixture(scope="module")
def faces():
    return load_face_encoder("diorama")


@pytest.fixture(autouse=True)
def few_characters(monkeypatch):
    """A gallery of two: six pictures of each of a hundred take minutes to draw."""
    monkeypatch.setattr(portraits, "gallery", lambda: gallery()[:COUNT])


def random_face_id(base, faces, variant, file):
    """A file of a face-id adapter of random weights, none of them zero."""
    dim = faces.embed_dim if variant == "faceid" else base.image_encoder.hidden_dim
    adapter = create_adapter(
        base.unet, variant, feature_dim=dim, id_dim=faces.embed_dim, lora_rank=2
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapter.metadata["face_encoder"] = faces.fingerprint()
    save_adapter(adapter, file)
    return file


@pytest.fixture(scope="module")
def face_id_file(base, faces, tmp_path_factory):
    return random_face_id(
        base, faces, "faceid", tmp_path_factory.mktemp("face-id") / "adapter.safetensors"
    )


def test_each_part_of_an_identity_is_left_out_in_turn(base, faces):
    results = measure_identity(
        base, load_identity(shipped(IDENTITIES["diorama"])), faces, SAMPLING, COUNT
    )
    assert list(results) == ["renders", *ABLATIONS]
    for result in results.values():
        assert result.images.shape == (COUNT, 3, 64, 64) and result.images.isfinite().all()
        assert result.found.shape == result.wanted.shape == result.errors_px.shape == (COUNT,)
    figures = {name: result.figures() for name, result in results.items()}
    assert figures["renders"]["right character"] == 1.0
    for first, second in pairwise(results.values()):
        assert not torch.equal(first.images, second.images)


def test_a_face_id_adapter_is_measured_without_identity_net(face_id_file, tmp_path, capsys):
    command = ["evaluate", str(face_id_file), "--what", "identity", "--count", str(COUNT)]
    command += ["--steps", "1", "--output", str(tmp_path / "look"), "--json"]
    assert main(command) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {name.split(": ")[0] for name in figures} == {"renders", "all", "text alone"}
    assert figures["renders: right character"] == figures["renders: style of the text"] == 1.0
    with Image.open(tmp_path / "look" / "identity.png") as sheet:
        assert sheet.width == 96 * COUNT


@pytest.mark.parametrize("variant", ["faceid", "faceid-plus"])
def test_a_face_id_adapter_draws_the_reference(base, faces, variant, tmp_path):
    adapter = load_person(random_face_id(base, faces, variant, tmp_path / "adapter.safetensors"))
    asked = portraits.unseen_portraits(COUNT)

    def drawn(wanted=asked, **options):
        return draw_identity(base, adapter, faces, wanted, SAMPLING, **options)

    strangers = portraits.Portraits(asked.characters, asked.targets, asked.references[::-1])
    whole = drawn()
    assert whole.isfinite().all()
    assert torch.equal(whole, drawn(without=ABLATIONS["without IdentityNet"]))
    alone = drawn(without=ABLATIONS["text alone"])
    for other in (drawn(strangers), drawn(scale=0.5), alone):
        assert not torch.equal(whole, other)


def test_what_reads_faces_is_measured_as_that(face_id_file, tmp_path, capsys):
    def refused(*arguments):
        assert main(["evaluate", *map(str, arguments), "--count", "1", "--steps", "1"]) == 2
        return capsys.readouterr().err

    assert "measure it with --what identity" in refused(face_id_file)
    assert "reads no faces" in refused(shipped(ADAPTERS["diorama"]), "--what", "identity")
    missing = tmp_path / "none.safetensors"
    assert "none.safetensors does not exist" in refused(missing, "--what", "identity")
