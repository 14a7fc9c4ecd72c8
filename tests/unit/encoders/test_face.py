"""Faces: the network of the embedded world, insightface behind the same interface, landmarks."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from imprompt.core.errors import ImpromptError
from imprompt.diorama import gallery, portrait, render
from imprompt.encoders import face
from imprompt.encoders.face import (
    CROP_PLACES,
    FaceEncoder,
    InsightFaceEncoder,
    aligned,
    face_encoder_with,
    load_face_encoder,
    loaded_face_encoder,
)
from imprompt.encoders.face_network import FaceNetwork
from imprompt.encoders.landmarks import landmark_images, landmarks_at_size, read_landmarks


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


@pytest.fixture
def insightface(monkeypatch):
    """A stand-in for the library, which keeps a list of the models that were built."""
    built = []

    class FaceAnalysis:
        def __init__(self, name):
            built.append(name)

        def prepare(self, ctx_id, det_size):
            pass

    monkeypatch.setitem(sys.modules, "insightface", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "insightface.app", SimpleNamespace(FaceAnalysis=FaceAnalysis))
    face._loaded.cache_clear()
    yield built
    face._loaded.cache_clear()


def bare_assertion(name):
    raise AssertionError  # as the library does, without a word


def test_a_model_in_a_folder_too_deep_is_told(monkeypatch, insightface):
    monkeypatch.setattr(sys.modules["insightface.app"], "FaceAnalysis", bare_assertion)
    with pytest.raises(ImpromptError, match=r"antelopev2: move its \.onnx files up"):
        load_face_encoder("insightface")


def test_an_encoder_is_loaded_once(insightface, tmp_path):
    first = loaded_face_encoder("insightface:buffalo_l")
    assert loaded_face_encoder("insightface:buffalo_l") is first
    assert face_encoder_with(first.fingerprint()) is first
    assert insightface == ["buffalo_l"]
    path = tmp_path / "own.safetensors"
    network = FaceNetwork(width=4, embed_dim=8)
    save_file(network.state_dict(), path)
    own = loaded_face_encoder(str(path))
    assert loaded_face_encoder(str(path)) is own
    os.utime(path, ns=(1, 1))  # as if it were written again
    assert loaded_face_encoder(str(path)) is not own
    assert face_encoder_with(own.fingerprint()) is None
    assert insightface == ["buffalo_l"]  # none was built to be compared


def test_an_encoder_that_generation_loads_serves_elsewhere():
    face._loaded.cache_clear()
    with torch.inference_mode():
        encoder = loaded_face_encoder("diorama")
    assert not any(p.is_inference() for p in encoder.network.parameters())


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


def test_a_face_that_fills_the_picture_is_found_in_a_wider_one():
    asked = []

    class Detector(Library):
        def get(self, picture):
            asked.append(picture.shape)
            if len(asked) == 1:
                return []
            top, left = 8, 16  # of the picture in the wider one
            assert picture[top:-top, left:-left].all() and not picture[0].any()
            where = np.array([[left + 4.0, top + 2.0]] * 5)
            bbox = np.array([left, top, left + 32.0, top + 16.0])
            return [SimpleNamespace(bbox=bbox, embedding=np.ones(512), kps=where)]

    encoder = InsightFaceEncoder(analysis=Detector())
    places = encoder.landmarks(torch.ones(1, 3, 16, 32))
    assert asked == [(16, 32, 3), (32, 64, 3)]
    torch.testing.assert_close(places, torch.tensor([4 / 32, 2 / 16]).expand(1, 5, 2))


def test_threads_look_for_faces_at_the_same_time(monkeypatch):
    both_look, library = Barrier(2), Library()

    def get(picture):
        both_look.wait(timeout=20)
        return library.get(picture)

    encoder = InsightFaceEncoder(analysis=SimpleNamespace(get=get))
    red = torch.stack([torch.ones(8, 8), -torch.ones(8, 8), -torch.ones(8, 8)])
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(encoder.finds_face, (red, -red))) == [True, True]
    # Both are known now, and not looked at again.
    embeds = encoder.embeds(torch.stack([red, -red]))
    assert embeds.argmax(1).tolist() == [1, 0]
    monkeypatch.setattr(face, "MAX_PICTURES_KNOWN", 2)
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(encoder.finds_face, (0.5 * red, -0.5 * red)))
    assert len(encoder._known) == 2


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


FACE = torch.tensor([[0.4, 0.4], [0.6, 0.4], [0.5, 0.5], [0.42, 0.6], [0.58, 0.6]])[None]


@pytest.mark.parametrize("size", [(1200, 800), (800, 1200), (100, 100)])
@pytest.mark.parametrize("wanted", [(1024, 1024), (512, 768), (768, 512)])
@pytest.mark.parametrize("shift", [0.0, -0.38])
def test_landmarks_keep_the_proportions_of_a_face(size, wanted, shift):
    places = FACE + shift
    moved = landmarks_at_size(places, size, wanted)
    assert moved.min() >= 0 and moved.max() <= 1
    before = torch.pdist(places[0] * torch.tensor(size[::-1]))
    after = torch.pdist(moved[0] * torch.tensor(wanted[::-1]))
    torch.testing.assert_close(after / after[0], before / before[0])


def test_landmarks_are_where_a_crop_in_the_middle_shows_them():
    torch.testing.assert_close(landmarks_at_size(FACE, (60, 60), (90, 90)), FACE)
    # Of 1200 rows of 800 the 800 in the middle are seen.
    moved = landmarks_at_size(FACE, (1200, 800), (1024, 1024))
    torch.testing.assert_close(moved[..., 0], FACE[..., 0])
    torch.testing.assert_close(moved[..., 1], (FACE[..., 1] * 1200 - 200) / 800)
    # A face at the upper edge would be cut off: all of the picture is shown, 2 / 3 as wide as the other.
    high = FACE - torch.tensor([0.0, 0.38])
    moved = landmarks_at_size(high, (1200, 800), (1024, 1024))
    torch.testing.assert_close(moved[..., 1], high[..., 1])
    torch.testing.assert_close(moved[..., 0], 1 / 6 + high[..., 0] * 2 / 3)


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


def test_limbs_are_ellipses_and_no_thicker_in_large_pictures():
    """As InstantID draws them: half way from the nose 8 px wide, at its tenths less, whatever the size."""
    places = torch.tensor([[0.3, 0.2], [0.9, 0.2], [0.3, 0.7], [0.9, 0.9], [0.95, 0.9]])[None]
    for size in (1024, 2048):
        eye = landmark_images(places, size, size)[
            0, 0
        ]  # red is the limb of the left eye, which stands above the nose
        for share, half_width in ((0.5, 4.0), (0.25, 3.46), (0.9, 2.4)):
            row = eye[round((0.7 - share * 0.5) * size)]
            width = (row[: size // 2] / 0.6).sum().item()
            assert width == pytest.approx(2 * half_width, abs=0.5)
        point = landmark_images(places, size, size)[0, 0, round(0.2 * size), : size // 2].sum()
        assert point.item() == pytest.approx(2 * 10, abs=1)


def test_landmarks_in_a_file(tmp_path):
    places = torch.rand(5, 2)
    (tmp_path / "face.json").write_text(json.dumps(places.tolist()))
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
