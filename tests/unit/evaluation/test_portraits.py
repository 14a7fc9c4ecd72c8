"""Who is seen in pictures, and how far the face is from where it was asked for."""

import pytest
import torch

from imprompt.diorama import STYLES, gallery, landmarks_of
from imprompt.evaluation.portraits import judge_identity, unseen_portraits

SIZE_PX = 16


class Faces:
    """Sees in each picture the person whose number its first pixel holds, and faces 2 px too far right."""

    name, embed_dim = "fake", 100

    def __init__(self, portraits):
        self.places = landmarks_of(portraits.targets)

    def embeds(self, pixels, *, normalized=True):
        return torch.eye(100)[pixels[:, 0, 0, 0].long()]

    def landmarks(self, pixels):
        return self.places + torch.tensor([2 / SIZE_PX, 0.0])

    def crops(self, pixels):
        return pixels

    def finds_face(self, pixels):
        return True

    def fingerprint(self):
        return "fake"


def test_portraits_are_of_the_gallery_and_unlike_their_references():
    portraits = unseen_portraits(120)
    assert [scene.character for scene in portraits.targets[:100]] == list(gallery())
    assert {scene.style for scene in portraits.targets} == set(STYLES)
    for target, reference in zip(portraits.targets, portraits.references, strict=True):
        assert target.character == reference.character
        for attribute in ("turn_degrees", "style", "setting"):
            assert getattr(target, attribute) != getattr(reference, attribute)
    assert portraits.texts == unseen_portraits(120).texts


def test_shares_are_counted():
    portraits = unseen_portraits(8)
    seen = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0])
    images = torch.zeros(8, 3, SIZE_PX, SIZE_PX)
    images[:, 0, 0, 0] = seen.float()
    faces = Faces(portraits)
    result = judge_identity(images, portraits, faces, torch.eye(100))
    figures = result.figures()
    assert figures["right character"] == pytest.approx(6 / 8)
    assert figures["landmark error in px"] == pytest.approx(2.0, abs=1e-4)
    first = [portraits.characters[i] for i in (0, 6, 7)]
    wrong = sum(character.glasses != first[0].glasses for character in first[1:])
    assert figures["right glasses"] == pytest.approx(1 - wrong / 8)
    assert figures[f"right character, {STYLES[2]}"] == 1.0
    assert figures[f"right character, {STYLES[0]}"] == 0.5  # pictures 0 and 6
