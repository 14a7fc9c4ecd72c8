"""`--published-guidance` on the command line."""

import argparse

import pytest
from PIL import Image
from tiny_base import write_tiny_xl_base

from imprompt.adapters import create_adapter
from imprompt.bases import load_base
from imprompt.cli import generate as verb
from imprompt.cli.main import create_parser


def test_published_guidance_lowers_the_scale(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "photo.png")
    seen = {}
    monkeypatch.setattr(
        "imprompt.generation.generate",
        lambda base, prompt, image_prompts, **settings: (
            seen.update(prompts=image_prompts) or [Image.new("RGB", (8, 8))]
        ),
    )
    adapter = create_adapter(
        load_base("diorama").unet, "instruct", feature_dim=160, resampler_dim=64, depth=1
    )
    monkeypatch.setattr(verb, "_adapter", lambda arguments: adapter)
    arguments = create_parser().parse_args(
        [
            "generate",
            "a dog",
            "--image",
            str(tmp_path / "photo.png"),
            "--output",
            str(tmp_path / "o.png"),
            "--instruction",
            "take the composition",
            "--published-guidance",
        ]
    )
    arguments.run(arguments)
    assert seen["prompts"][0].scale == pytest.approx(0.8)
    told = Image.open(tmp_path / "o.png").text["parameters"]
    assert "CFG scale: 6, Image CFG scale: 1, Instruction CFG scale: 6" in told
    assert "Scale: 0.8" in told


def test_published_guidance_is_the_bases(tmp_path):
    xl = load_base(write_tiny_xl_base(tmp_path / "xl"))
    told = argparse.Namespace(published_guidance=True, instruction=["take the composition"])
    assert verb._published_guidance(told, xl).text_scale == 5.0
