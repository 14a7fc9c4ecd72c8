"""Every system that makes pictures draws what it has learned."""

import pytest
from PIL import Image, ImageChops
from tiny_base import write_tiny_base

from imprompt.bases import load_base
from imprompt.data.dataset import Columns
from imprompt.data.prepare import prepare
from imprompt.evaluation import previews
from imprompt.evaluation.previews import preview_of
from imprompt.training.run import prepare_run, run_training

COUNT = 3
CASES = {
    "autoencoder": ("diorama:6", {"columns": ("pixels",)}, ["system.start=base"], 2),
    "image-prompt": ("diorama:6", {}, [], 2),
    "instruct": ("diorama-instruct:6", {"variant": "instruct"}, [], 2),
    "identity": ("diorama-people:8", {"variant": "identity"}, [], 3),
    "face-id": ("diorama-people:8", {"variant": "faceid"}, [], 2),
    "controlnet": (
        "diorama:6",
        {"columns": ("latent_mean", "latent_logvar", "text_ids", "control_depth")},
        ["system.kind=depth"],
        3,
    ),
    "t2i-adapter": (
        "diorama:6",
        {"columns": ("latent_mean", "latent_logvar", "text_ids", "control_depth")},
        ["system.kind=depth"],
        3,
    ),
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.mark.parametrize("name", CASES)
def test_a_preview_shows_rows_of_pictures(name, base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(previews, "PREVIEW", previews.Sampling(steps=2, guidance_scale=4.0))
    source, how, settings, num_rows = CASES[name]
    base = load_base(base_folder)
    columns = Columns.open(prepare(source, tmp_path / "data", base, **how))
    settings = ["train.steps=1", "train.validation_rows=4", *settings]
    system, _, _ = prepare_run(name, base, columns, None, settings)
    preview = preview_of(system, base, columns, COUNT)
    picture = preview()
    assert isinstance(picture, Image.Image)
    width, height = picture.size
    assert abs(width / COUNT - height / num_rows) < 0.2 * width / COUNT
    assert ImageChops.difference(picture, preview()).getbbox() is None  # fixed seeds
    last = picture.crop((0, height * (num_rows - 1) // num_rows, width, height))
    assert len(set(last.convert("L").getdata())) > 8


@pytest.mark.parametrize("name", CASES)
def test_what_is_drawn_is_as_large_as_the_data(name, base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(previews, "PREVIEW", previews.Sampling(steps=1, guidance_scale=4.0))
    source, how, settings, num_rows = CASES[name]
    base = load_base(base_folder)
    columns = Columns.open(prepare(source, tmp_path / "data", base, size_px=16, **how))
    assert base.image_size_px == 32
    settings = ["train.steps=1", "train.validation_rows=4", *settings]
    system, _, _ = prepare_run(name, base, columns, None, settings)
    preview = preview_of(system, base, columns, COUNT)
    picture = preview()
    assert picture is not None and picture.size == (COUNT * 16, num_rows * 16)


@pytest.mark.parametrize("name", CASES)
def test_a_run_beside_a_base_in_half_precision_draws(name, base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(previews, "PREVIEW", previews.Sampling(steps=1, guidance_scale=4.0))
    source, how, settings, _ = CASES[name]
    run_training(
        name,
        data=prepare(source, tmp_path / "data", load_base(base_folder), **how),
        base=str(base_folder),
        output=tmp_path / "run",
        settings=[
            "train.steps=1",
            "train.batch_size=2",
            "train.validation_rows=3",
            "train.precision=bfloat16",
            "train.frozen_precision=bfloat16",
            "train.report_to=none",
            *settings,
        ],
        preview_of=preview_of,
    )
    assert (tmp_path / "run/previews/step-00000001.png").is_file()


def test_no_more_is_drawn_than_is_held_out(base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(previews, "PREVIEW", previews.Sampling(steps=1))
    settings = ["steps=1", "batch_size=2", "validation_rows=2", "preview_images=4"]
    run_training(
        "image-prompt",
        data=prepare("diorama:6", tmp_path / "data", load_base(base_folder)),
        base=str(base_folder),
        output=tmp_path / "run",
        settings=[f"train.{setting}" for setting in (*settings, "report_to=none")],
        preview_of=preview_of,
    )
    assert Image.open(tmp_path / "run/previews/step-00000001.png").size == (2 * 32, 2 * 32)


def test_systems_beside_no_base_and_none_wanted_draw_nothing(base_folder, tmp_path):
    base = load_base(base_folder)
    columns = Columns.open(prepare("diorama:6", tmp_path / "data", base))
    settings = ["train.steps=1", "train.validation_rows=0"]
    system, _, _ = prepare_run("image-prompt", base, columns, None, settings)
    assert preview_of(system, base, columns, 0) is None
