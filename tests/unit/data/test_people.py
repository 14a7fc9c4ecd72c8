"""Portraits in twos, and what is cached of them."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pair_files import captions, listed, pairs_of
from PIL import Image
from safetensors.torch import save_file
from tiny_base import write_tiny_base

from imprompt.bases import load_base
from imprompt.core.errors import ImpromptError
from imprompt.data import batch
from imprompt.data.dataset import Columns
from imprompt.data.on_the_fly import PairsOnTheFly
from imprompt.data.prepare import prepare
from imprompt.diorama import character_number, render, training_portrait
from imprompt.diorama.people import reference_seed
from imprompt.encoders import face
from imprompt.encoders.face import load_face_encoder
from imprompt.encoders.face_network import FaceNetwork


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A file with a tiny face encoder, as training writes it."""
    torch.manual_seed(0)
    network = FaceNetwork(width=4, embed_dim=8).eval()
    path = tmp_path_factory.mktemp("faces") / "tiny.safetensors"
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    return str(path)


def test_a_portraits_reference_is_another_one_of_the_same_person():
    for pair in pairs_of("diorama-people:10:4"):
        assert pair.image.character == pair.reference.character
        assert pair.image != pair.reference
        assert character_name_free(pair.read_caption())


def character_name_free(caption):
    return not any(word in caption for word in ("hair", "skin", "glasses", "beard", "bald"))


def test_columns_of_portraits(base, faces, tmp_path):
    columns = ("id_embeds", "id_lengths", "landmarks", "character", "reference_hidden_states")
    data = Columns.open(
        prepare(
            "diorama-people:5",
            tmp_path / "data",
            base,
            columns=columns,
            size_px=32,
            face_encoder=faces,
        )
    )
    rows = data.rows(range(5), columns)
    scenes = [training_portrait(seed) for seed in range(5)]
    references = [training_portrait(reference_seed(seed)) for seed in range(5)]
    encoder = load_face_encoder(faces)
    wanted = encoder.embeds(render(references, 32).pixels)
    torch.testing.assert_close(rows["id_embeds"].float(), wanted, atol=2e-3, rtol=0)
    raw = encoder.embeds(render(references, 32).pixels, normalized=False)
    torch.testing.assert_close(rows["id_lengths"] * wanted, raw, atol=1e-4, rtol=1e-3)
    assert rows["character"].tolist() == [character_number(scene.character) for scene in scenes]
    places = render(scenes, 32).keypoints / 32
    torch.testing.assert_close(rows["landmarks"], places, atol=1e-5, rtol=0)
    states = base.image_encoder.hidden_states(render(references, 32).pixels)
    torch.testing.assert_close(
        rows["reference_hidden_states"].float(), states, atol=2e-3, rtol=2e-3
    )
    assert data.meta["face_encoder"] == encoder.fingerprint()


def test_identity_vectors_may_be_added_later_but_not_of_another_encoder(base, faces, tmp_path):
    output = tmp_path / "data"
    prepare("diorama-people:2", output, base, columns=("text_ids",), size_px=32)
    assert "face_encoder" not in Columns.open(output).meta
    prepare(
        "diorama-people:2", output, base, columns=("id_embeds",), size_px=32, face_encoder=faces
    )
    prepare("diorama-people:2", output, base, columns=("character",), size_px=32)
    assert Columns.open(output).meta["face_encoder"] == load_face_encoder(faces).fingerprint()
    description = output / "face_encoder.json"
    description.write_text(json.dumps({"fingerprint": "another"}))
    with pytest.raises(ImpromptError, match="another face encoder"):
        prepare(
            "diorama-people:2", output, base, variant="identity", size_px=32, face_encoder=faces
        )


def test_characters_are_known_of_persons_only(base, faces, tmp_path):
    with pytest.raises(ImpromptError, match="diorama-people"):
        prepare("diorama:13", tmp_path / "data", base, columns=("character",))


def test_a_list_names_references(base, faces, tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
    entries = [
        {"image_file": "a.png", "text": "one", "reference_file": "b.png"},
        {"image_file": "b.png", "text": "two", "reference_file": "missing.png"},
        {"image_file": "b.png", "text": "three", "reference_file": "../outside.png"},
        {"image_file": "b.png", "text": "four"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    columns = ("id_embeds", "reference_hidden_states", "hidden_states")
    output = prepare(
        str(tmp_path / "list.json"), tmp_path / "data", base, columns=columns, face_encoder=faces
    )
    rows = Columns.open(output).rows(range(2), columns)
    assert torch.equal(rows["reference_hidden_states"][0], rows["hidden_states"][1])
    assert torch.equal(rows["reference_hidden_states"][1], rows["hidden_states"][1])
    told = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["kind"] for entry in told] == ["reference missing", "image outside"]


def test_an_image_may_have_several_references(base, faces, tmp_path):
    for number, name in enumerate("abc"):
        Image.new("RGB", (40, 40), (80 * number, 9, 9)).save(tmp_path / f"{name}.png")
    pairs = [("a", "b"), ("a", "c"), ("a", "b"), ("a", None), ("a", None)]
    entries = [
        {"image_file": f"{image}.png", "text": "one"}
        | ({"reference_file": f"{reference}.png"} if reference else {})
        for image, reference in pairs
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    data = Columns.open(
        prepare(
            str(tmp_path / "list.json"),
            tmp_path / "data",
            base,
            columns=("id_embeds",),
            face_encoder=faces,
        )
    )
    assert len(data) == 3
    contents = [row["content"] for row in listed(data)]
    digest = hashlib.blake2b((tmp_path / "a.png").read_bytes(), digest_size=8).digest()
    assert contents[2] == int.from_bytes(digest, "little", signed=True)  # as it was ever written


def test_pictures_that_are_kept_are_not_drawn_again(base, faces, tmp_path, monkeypatch):
    columns = ("pixels", "latent_mean", "id_embeds")
    straight = prepare(
        "diorama-people:8", tmp_path / "straight", base, columns=columns, size_px=32,
        face_encoder=faces,
    )  # fmt: skip
    added = tmp_path / "added"
    prepare("diorama-people:8", added, base, columns=("pixels",), size_px=32)
    monkeypatch.setattr(batch, "draw", None)
    prepare("diorama-people:8", added, base, columns=columns, size_px=32, face_encoder=faces)
    first, second = (Columns.open(f).rows(range(8), columns) for f in (straight, added))
    assert all(torch.equal(first[name], second[name]) for name in columns)


class Detector:
    """Sees a face in every picture that is not all black, and counts how often it looks."""

    def __init__(self):
        self.looks = 0

    def get(self, picture):
        self.looks += 1
        found = SimpleNamespace(bbox=[0, 0, 9, 9], embedding=np.ones(512), kps=np.eye(5)[:, :2])
        return [found] if picture.any() else []


@pytest.fixture
def detector(monkeypatch):
    found = Detector()
    packs = []
    monkeypatch.setattr(face, "_face_analysis", lambda pack: packs.append(pack) or found)
    face._loaded.cache_clear()
    yield found
    face._loaded.cache_clear()
    assert packs == ["buffalo_l"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "black"), ("c", "blue"), ("d", "green")):
        Image.new("RGB", (40, 40), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    return str(folder)


def test_photos_are_read_by_insightface_and_those_without_a_face_are_left_out(
    base, photos, tmp_path, detector
):
    output = prepare(photos, tmp_path / "data", base, variant="faceid")
    told = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["pair"], entry["kind"]) for entry in told] == [("b.png", "face missing")]
    data = Columns.open(output)
    assert captions(data) == ["a", "c", "d"]
    known = face.InsightFaceEncoder("buffalo_l", analysis=detector).fingerprint()
    assert data.meta["face_encoder"] == known
    # Once for each, though asked whether there is a face, and whose; twice where none was found at first.
    assert detector.looks == 5
    live = PairsOnTheFly(photos, base, variant="faceid")
    assert "face_encoder" not in live.meta
    live.require(["id_embeds"])
    assert live.meta["face_encoder"] == known
    embeds = live.rows([1, 2], ["id_embeds"])["id_embeds"]
    assert embeds.shape == (2, 512) and live.unusable[1]["kind"] == "face missing"


def test_only_lessons_of_faces_need_a_face(photos, tmp_path, detector):
    write_tiny_base(tmp_path / "base", image_encoder=True)
    told = [("a", "face"), ("b", "face"), ("b", "style"), ("c", "object"), ("c", "")]
    lines = [
        {
            "image_file": f"{photos}/{name}.png",
            "text": f"{name} {task}",
            "condition_image": f"{photos}/d.png",
            "instruction": f"use {task or 'it'}",
            "task": task,
        }
        for name, task in told
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    output = prepare(
        str(tmp_path / "pairs.jsonl"),
        tmp_path / "data",
        load_base(tmp_path / "base"),
        variant="instruct-faces",
        face_encoder="insightface:buffalo_l",
    )
    data = Columns.open(output)
    rows = data.rows(range(len(data)), ("task_ids", "id_embeds"))
    assert rows["task_ids"].tolist() == [4, 1, 2, -1]
    assert rows["id_embeds"].any(1).tolist() == [True, False, False, True]
    assert detector.looks == 4


def test_a_row_whose_picture_has_no_face_is_named(base, photos, tmp_path, detector):
    prepare(photos, tmp_path / "data", base, columns=("text_ids",))
    with pytest.raises(ImpromptError, match=r"b\.png has a row already.*a new folder"):
        prepare(photos, tmp_path / "data", base, variant="faceid")
