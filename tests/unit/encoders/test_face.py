"""Faces: the network of the embedded world, insightface behind the same interface, landmarks."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from imprompt.core.errors import ImpromptError
from imprompt.diorama import gallery, portrait, render
from imprompt.encoders.face import (
    CROP_PLACES,
    FaceEncoder,
    InsightFaceEncoder,
    aligned,
    load_face_encoder,
)
from imprompt.encoders.landmarks import landmark_images, read_landmarks, write_landmarks


@pytest.fixture(scope="module")
def portraits():
    people = [gallery()[i] for i in range(12)]
    styles = ("clay", "cartoon", "watercolor", "crayon")
    scenes = [
        portrait(7_000_000 + 10 * i + k, people[i], style=styles[(i + k) % 4], setting="studio")
        for i in range(12)
        for k in range(2)
    ]
    return render(scenes)


def test_the_shipped_encoder_knows_unseen_persons_again(portraits):
    encoder = load_face_encoder()
    assert isinstance(encoder, FaceEncoder)
    embeds = encoder.embeds(portraits.pixels)
    assert embeds.shape == (24, encoder.embed_dim)
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(24))
    nearest = (embeds[1::2] @ embeds[::2].T).argmax(1)
    assert (nearest == torch.arange(12)).float().mean() >= 0.8


def test_it_finds_landmarks_at_any_size(portraits):
    encoder = load_face_encoder()
    found = encoder.landmarks(portraits.pixels) * 64
    assert (found - portraits.keypoints).norm(dim=2).mean() < 2.0
    twice = torch.nn.functional.interpolate(portraits.pixels, scale_factor=2, mode="bilinear")
    assert (encoder.landmarks(twice) * 64 - found).norm(dim=2).mean() < 0.5


def test_an_encoder_that_is_none_is_told(tmp_path):
    with pytest.raises(ImpromptError, match="no face encoder 'nobody'"):
        load_face_encoder("nobody")
    with pytest.raises(ImpromptError, match="imprompt train face-encoder"):
        load_face_encoder(tmp_path / "missing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(ImpromptError, match="no face encoder of the embedded world"):
        load_face_encoder(tmp_path / "broken.safetensors")


def test_without_insightface_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface", None)
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(ImpromptError, match=r"pip install .imprompt\[faces\]"):
        load_face_encoder("insightface")


class Library:
    """What insightface's FaceAnalysis does with a picture: BGR bytes in, faces out."""

    def get(self, picture):
        assert picture.dtype == np.uint8 and picture.flags["C_CONTIGUOUS"]
        if not picture.any():
            return []
        small = SimpleNamespace(bbox=[0, 0, 2, 2], embedding=np.ones(512), kps=np.zeros((5, 2)))
        # The red channel comes last.
        direction = np.eye(512, dtype=np.float32)[int(picture[..., 2].mean() > 100)]
        large = SimpleNamespace(
            bbox=[0, 0, 9, 9], embedding=20 * direction, kps=np.full((5, 2), 8.0)
        )
        return [small, large]


def test_insightface_is_asked_for_the_largest_face():
    encoder = InsightFaceEncoder(analysis=Library())
    assert isinstance(encoder, FaceEncoder)
    pixels = torch.full((2, 3, 16, 32), -0.5)
    pixels[1, 0] = 1.0  # red
    torch.testing.assert_close(encoder.embeds(pixels), torch.eye(512)[:2])
    assert encoder.embeds(pixels, normalized=False).norm(dim=1).tolist() == [20.0, 20.0]
    expected = torch.tensor([0.25, 0.5]).expand(2, 5, 2)
    torch.testing.assert_close(encoder.landmarks(pixels), expected)
    with pytest.raises(ImpromptError, match="no face in picture 2 of 2"):
        encoder.embeds(torch.stack([pixels[0], torch.full((3, 16, 32), -1.0)]))


def test_a_crop_brings_the_landmarks_to_their_places():
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    places = (torch.tensor(CROP_PLACES) / 112) @ turn.T * 60 + torch.tensor([70.0, 20.0])
    pixels = torch.full((1, 3, 120, 160), -1.0)
    for channel, (x, y) in enumerate(places[:3].round().long().tolist()):
        pixels[0, channel, y - 2 : y + 3, x - 2 : x + 3] = 1.0
    crop = aligned(pixels, places)
    assert crop.shape == (1, 3, 224, 224)
    for channel in range(3):
        weight = (crop[0, channel].clamp(min=0) > 0.2).float()
        y, x = torch.nonzero(weight).float().mean(0).tolist()
        wanted_x, wanted_y = (2 * v for v in CROP_PLACES[channel])
        assert abs(x - wanted_x) < 3 and abs(y - wanted_y) < 3


def test_a_turned_face_is_as_large_in_the_crop_as_insightface_makes_it():
    """Umeyama's fit of the face's places to the crop's; the fit of crop to picture would enlarge it."""
    places = torch.tensor(CROP_PLACES) * torch.tensor([0.4, 1.0]) + 20  # in profile, eyes are close
    wanted = 2 * torch.tensor(CROP_PLACES)
    source, target = places - places.mean(0), wanted - wanted.mean(0)
    strengths = torch.linalg.svdvals(target.T @ source)
    scale = float(strengths.sum() / source.square().sum())
    pixels = torch.full((1, 3, 160, 160), -1.0)
    middle = places.mean(0).round().long().tolist()
    pixels[0, :, middle[1] - 10 : middle[1] + 10, middle[0] - 10 : middle[0] + 10] = 1.0
    bright = (aligned(pixels, places)[0, 0] > 0).sum().item()
    assert bright**0.5 / 20 == pytest.approx(scale, rel=0.02)


def test_a_crop_is_black_beyond_the_picture():
    crop = aligned(torch.ones(1, 3, 30, 30), torch.tensor(CROP_PLACES) / 2 - 15)
    assert crop.min() == -1 and crop.max() == 1


def test_a_drawing_of_landmarks():
    places = torch.tensor([[0.2, 0.2], [0.8, 0.2], [0.5, 0.5], [0.3, 0.8], [0.7, 0.8]])[None]
    picture = landmark_images(places, 64, 64)
    assert picture.shape == (1, 3, 64, 64) and picture.min() >= 0 and picture.max() <= 1
    colours = picture[0, :, (places[0, :, 1] * 64).long(), (places[0, :, 0] * 64).long()].T
    wanted = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1]]
    torch.testing.assert_close(colours, torch.tensor(wanted).float())
    middle = picture[0, :, 22, 22]  # on the limb from the nose to the left eye
    torch.testing.assert_close(middle, torch.tensor([0.6, 0.0, 0.0]))
    assert picture[0, :, 5, 32].max() == 0
    large = landmark_images(places, 1024, 1024)
    assert large[0, 0, 205 - 9, 205] == 1 and large[0, 0, 205 - 12, 205] == 0


def test_landmarks_in_a_file(tmp_path):
    places = torch.rand(5, 2)
    write_landmarks(places, tmp_path / "face.json")
    torch.testing.assert_close(read_landmarks(tmp_path / "face.json")[0], places, atol=1e-4, rtol=0)
    for content, said in (("[[1, 2]]", "shape"), ("no", "no landmarks"), ("[[300, 200]]", "shape")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ImpromptError, match=said):
            read_landmarks(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text(str([[30, 20]] * 5))
    with pytest.raises(ImpromptError, match="pixels"):
        read_landmarks(tmp_path / "bad.json")
    with pytest.raises(ImpromptError, match="no landmarks file"):
        read_landmarks(tmp_path / "none.json")
