"""An adapter on pictures of one's own, by any CLIP model."""

import json

import pytest
import torch
from PIL import Image
from tiny_base import text_config, vision_config, write_tiny_base
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from imprompt.adapters import create_adapter
from imprompt.bases import load_base
from imprompt.checkpoints import save_adapter
from imprompt.cli.main import main
from imprompt.core.errors import ImpromptError
from imprompt.evaluation.clip_model import load_clip_model
from imprompt.evaluation.clip_scores import mean_clip_score
from imprompt.evaluation.measure import Sampling
from imprompt.evaluation.pictures import Shown, last_pairs, measure_pictures

COLOURS = ("red", "blue", "green", "white", "black")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def clip_folder(base_folder, tmp_path_factory):
    """A whole CLIP model, as transformers writes it."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {**text_config(16), "projection_dim": 8}
    vision = {**vision_config(), "projection_dim": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(
        folder
    )
    CLIPTokenizer.from_pretrained(base_folder / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (40, 48), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} cat")
    (folder / "4.png").write_bytes(b"damaged")
    return folder


def test_directions_are_those_of_the_whole_model(clip_folder):
    clip, model = load_clip_model(clip_folder), CLIPModel.from_pretrained(clip_folder).eval()
    size = model.config.vision_config.image_size
    pixels = torch.rand(3, 3, size, size) * 2 - 1
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    texts = ["red cat", "a cat", ""]
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    length = model.config.text_config.max_position_embeddings
    ids = tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids
    with torch.no_grad():
        whole = model(input_ids=ids, pixel_values=((pixels + 1) / 2 - mean) / deviation)
    torch.testing.assert_close(clip.of_images(pixels), whole.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.of_texts(texts), whole.text_embeds, atol=1e-5, rtol=0)


def test_the_last_pairs_that_can_be_used_are_measured(photos, capsys):
    shown = last_pairs(str(photos), 2, 32)
    assert shown.captions == ["a green cat", "a white cat"]
    assert shown.pixels.shape == (2, 3, 32, 32) and shown.pixels[1].min() == 1
    assert len(last_pairs(str(photos), 9, 32).captions) == 4
    assert "has 4 pairs that can be used" in capsys.readouterr().err
    for number in range(4):
        (photos / f"{number}.png").write_bytes(b"damaged")
    with pytest.raises(ImpromptError, match=r"No pair of .* can be used; 0\.png: .*no image"):
        last_pairs(str(photos), 2, 32)


class Brightness:
    """Sees how bright a picture is, and of texts whether they say so."""

    def of_images(self, pixels):
        bright = pixels.mean((1, 2, 3))
        return functional.normalize(torch.stack([bright, torch.ones_like(bright)], 1), dim=1)

    def of_texts(self, texts):
        return functional.normalize(
            torch.tensor([[1.0 if "white" in text else -1.0, 1.0] for text in texts]), dim=1
        )


def test_figures_compare_each_with_its_own_picture_and_caption(base_folder, monkeypatch):
    base = load_base(base_folder)
    adapter = create_adapter(base.unet, feature_dim=base.image_encoder.embed_dim)
    shown = Shown(torch.stack([torch.ones(3, 32, 32), -torch.ones(3, 32, 32)]), ["white", "black"])
    asked = []

    def copying(base, prompts, prompt, **options):
        """The adapter of one's dreams: at λ = 1 it draws what it is shown, without it noise of grey."""
        asked.append((prompts, prompt.scale, prompt.merge))
        pixels = [prompt.scale * image for image in prompt.images]
        return [Image.fromarray(((p + 1) * 127.5).byte().permute(1, 2, 0).numpy()) for p in pixels]

    monkeypatch.setattr("imprompt.evaluation.pictures.generate", copying)
    figures, sheet = measure_pictures(base, adapter, Brightness(), shown, Sampling(), (0.0, 1.0))
    assert asked == [
        (["", ""], 1.0, "each"),
        (["white", "black"], 0.0, "each"),
        (["white", "black"], 1.0, "each"),
    ]
    assert figures["the pictures themselves: CLIP-T"] == pytest.approx(2.5)
    for name in ("image alone, λ=1", "image and caption, λ=1"):
        assert figures[f"{name}: CLIP-I"] == pytest.approx(1)
        assert figures[f"{name}: CLIP-T"] == pytest.approx(2.5)
    assert figures["image and caption, λ=0: CLIP-I"] == pytest.approx(0.5**0.5, abs=0.01)
    assert sheet.size == (2 * 32, 4 * (32 + 14))


def test_a_clip_score_is_never_below_zero_for_any_picture():
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    assert mean_clip_score(images, texts) == pytest.approx(1.25)  # (2.5 · 1 + 0) / 2


def test_on_the_command_line(base_folder, clip_folder, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = load_base(base_folder)
    save_adapter(
        create_adapter(base.unet, feature_dim=base.image_encoder.embed_dim), "a.safetensors"
    )
    command = ["evaluate", "a.safetensors", "--what", "pictures", "--base", str(base_folder)]
    asked = ["--data", str(photos), "--clip", str(clip_folder), "--count", "3", "--steps", "2"]
    assert main([*command, *asked, "--scales", "0.5", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert len(figures) == 5 and all(-1 <= value <= 1 for value in figures.values())
    assert Image.open("evaluations/pictures/pictures.png").width == 3 * 32
    assert main(command) == 2
    assert "Name the pictures with --data" in capsys.readouterr().err
    assert main(["evaluate", *command[2:], *asked[:2]]) == 2
    assert f"Name the adapter to measure on the base {base_folder.name}" in capsys.readouterr().err
    assert main(["evaluate", "--data", str(photos)]) == 2
    assert "does not look at --data" in capsys.readouterr().err
    assert main([*command, *asked[:2], "--clip", str(tmp_path)]) == 2
    assert "could not be read" in capsys.readouterr().err
