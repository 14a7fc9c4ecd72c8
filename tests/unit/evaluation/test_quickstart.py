"""The quickstart's whole way, at the smallest size, on the shipped base."""

import pytest
import torch
from safetensors.torch import load_file

from imprompt.adapters import create_adapter
from imprompt.bases import load_base
from imprompt.checkpoints import load_adapter
from imprompt.core.errors import ImpromptError
from imprompt.evaluation.judge import load_judge
from imprompt.evaluation.measure import Sampling, measure_adapter, measure_text_and_image
from imprompt.evaluation.quickstart import quickstart

SETTINGS = ["train.steps=4", "train.batch_size=4", "train.validate_every_steps=2"]


def test_it_ends_with_a_report_and_runs_again_without_harm(tmp_path, capsys, monkeypatch):
    sampling = Sampling(steps=3, guidance_scale=4.0)
    monkeypatch.setattr("imprompt.evaluation.quickstart.SAMPLING", sampling)
    report = quickstart(tmp_path / "first", num_pairs=72, settings=SETTINGS, num_judged=4)
    page = report.read_text()
    assert "bit for bit" in page and page.count("data:image/png") > 50
    assert load_adapter(tmp_path / "first/run/adapter.safetensors").variant == "base"
    made = load_file(tmp_path / "first/run/adapter.safetensors")
    quickstart(tmp_path / "first", num_pairs=72, settings=SETTINGS, num_judged=4)
    again = load_file(tmp_path / "first/run/adapter.safetensors")
    assert made.keys() == again.keys()
    assert all(torch.equal(made[name], again[name]) for name in made)
    assert "report" in capsys.readouterr().out


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine")
    with pytest.raises(ImpromptError, match="not empty and holds no quickstart"):
        quickstart(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_at_weight_zero_an_adapter_keeps_nothing_of_the_image():
    base, judge = load_base("diorama"), load_judge()
    assert base.image_encoder is not None
    adapter = create_adapter(base.unet, feature_dim=base.image_encoder.embed_dim)
    sampling = Sampling(steps=2, guidance_scale=2.0)
    zero = measure_adapter(base, adapter, judge, sampling, count=4, scale=0.0)
    _, references, points = measure_text_and_image(
        base, adapter, judge, sampling, count=4, scales=(0.0, 1.0)
    )
    assert zero.images.shape == references.shape == (4, 3, 64, 64)
    assert not torch.equal(points[0].images, points[1].images)
