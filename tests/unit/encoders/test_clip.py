"""CLIP's image encoder against the steps that transformers' own preprocessing takes."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from tiny_base import (
    VISION_EMBED_DIM,
    VISION_HIDDEN_DIM,
    VISION_SIZE_PX,
    build_parts,
    write_tiny_base,
)

from imprompt.bases import load_base
from imprompt.bases.clip_vision import CLIP_MEAN, CLIP_STANDARD_DEVIATION
from imprompt.core.errors import ImpromptError
from imprompt.encoders import ClipImageEncoder, load_clip


@pytest.fixture(scope="module")
def encoder() -> ClipImageEncoder:
    return ClipImageEncoder(build_parts()["image_encoder"])


@pytest.mark.parametrize("size_px", [(16, 16), (64, 64), (40, 90), (77, 20), (8, 8), (1, 1)])
def test_pixels_are_prepared_as_for_an_image_file(
    encoder: ClipImageEncoder, size_px: tuple[int, int]
) -> None:
    """Pillow's bicubic resize of the shorter side, centre crop, CLIP's statistics."""
    height, width = size_px
    # Muted colours: Pillow clips overshoots of its first pass, across, before its second, down.
    generator = numpy.random.default_rng(0)
    numbers = generator.integers(80, 176, (height, width, 3), dtype=numpy.uint8)
    image = Image.fromarray(numbers)
    ratio = VISION_SIZE_PX / min(size_px)
    image = image.resize((int(width * ratio), int(height * ratio)), Image.Resampling.BICUBIC)
    left, top = (image.width - VISION_SIZE_PX) // 2, (image.height - VISION_SIZE_PX) // 2
    image = image.crop((left, top, left + VISION_SIZE_PX, top + VISION_SIZE_PX))
    wanted = torch.from_numpy(numpy.asarray(image) / 255).permute(2, 0, 1)
    wanted = wanted - torch.tensor(CLIP_MEAN)[:, None, None]
    wanted = wanted / torch.tensor(CLIP_STANDARD_DEVIATION)[:, None, None]

    pixels = torch.from_numpy(numbers).permute(2, 0, 1)[None] / 127.5 - 1
    one_step_of_colour = 1 / 255 / min(CLIP_STANDARD_DEVIATION)
    difference = encoder.normalized(pixels)[0] - wanted
    assert difference.abs().max() < 1.5 * one_step_of_colour


def test_features_are_those_of_the_model(encoder: ClipImageEncoder) -> None:
    pixels = torch.rand(2, 3, 24, 32) * 2 - 1
    output = encoder.model(encoder.normalized(pixels), output_hidden_states=True)
    assert torch.equal(encoder.embeds(pixels), output.image_embeds)
    assert torch.equal(encoder.hidden_states(pixels), output.hidden_states[-2])
    assert output.image_embeds.shape == (2, VISION_EMBED_DIM) == (2, encoder.embed_dim)
    assert encoder.hidden_states(pixels).shape == (2, 5, VISION_HIDDEN_DIM)
    assert encoder.hidden_dim == VISION_HIDDEN_DIM


def test_no_image_is_an_all_zero_normalised_one(encoder: ClipImageEncoder) -> None:
    zeros = torch.zeros(1, 3, VISION_SIZE_PX, VISION_SIZE_PX)
    wanted = encoder.model(zeros, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(encoder.zero_hidden_states(), wanted)


def test_what_was_encoded_in_inference_mode_still_serves_training() -> None:
    encoder = ClipImageEncoder(build_parts()["image_encoder"])
    with torch.inference_mode():
        encoder.zero_hidden_states()
    weight = torch.ones(VISION_HIDDEN_DIM, requires_grad=True)
    (encoder.zero_hidden_states() * weight).sum().backward()
    assert weight.grad is not None


def test_nothing_of_it_is_trained(encoder: ClipImageEncoder) -> None:
    pixels = torch.zeros(1, 3, 16, 16, requires_grad=True)
    assert not encoder.embeds(pixels).requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_folder_of_its_own_loads(tmp_path: Path, encoder: ClipImageEncoder) -> None:
    build_parts()["image_encoder"].save_pretrained(tmp_path / "vision")
    loaded = load_clip(tmp_path / "vision")
    assert loaded.fingerprint() == encoder.fingerprint()
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded.embeds(pixels), encoder.embeds(pixels))
    statistics = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "vision" / "preprocessor_config.json").write_text(json.dumps(statistics))
    torch.testing.assert_close(load_clip(tmp_path / "vision").normalized(pixels), pixels)


def test_one_of_several_is_named_after_a_colon(
    tmp_path: Path, encoder: ClipImageEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "name/models"
    build_parts()["image_encoder"].save_pretrained(models / "image_encoder")
    for loaded in (
        load_clip(f"{tmp_path}/name:models/image_encoder"),
        load_clip(tmp_path / "name", subfolder="models/image_encoder"),
    ):
        assert loaded.fingerprint() == encoder.fingerprint()
    asked = []
    monkeypatch.setattr(
        "imprompt.encoders.clip.load_image_encoder",
        lambda source, name, dtype, subfolder: asked.append((source, subfolder)) or encoder,
    )
    load_clip("owner/name:models/image_encoder")
    load_clip("owner/name", subfolder="models/image_encoder")
    load_clip("owner/name")
    assert asked == [("owner/name", "models/image_encoder")] * 2 + [("owner/name", "")]


def test_a_base_brings_its_own(tmp_path: Path, encoder: ClipImageEncoder) -> None:
    base = load_base(write_tiny_base(tmp_path / "tiny"), dtype=torch.bfloat16)
    assert base.image_encoder is not None
    assert base.image_encoder.fingerprint() == encoder.fingerprint()
    embeds = base.image_encoder.embeds(torch.rand(1, 3, 20, 20))
    assert embeds.dtype == torch.bfloat16


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImpromptError, match="no such folder"):
        load_clip(tmp_path / "nowhere")
    for name in ("nowhere", "owner/name:", "a/b/c:d", ":d"):
        with pytest.raises(ImpromptError, match="no such folder"):
            load_clip(name)
    with pytest.raises(ImpromptError, match="model could not be read"):
        load_clip(tmp_path)
