"""Judging, measuring and telling."""

import pytest
import torch
from PIL import Image
from tiny_base import write_tiny_base

from imprompt.adapters import create_adapter
from imprompt.bases import load_base
from imprompt.cli.evaluate import with_unit
from imprompt.cli.main import main
from imprompt.core.errors import ImpromptError
from imprompt.diorama import OBJECT_KINDS, render
from imprompt.diorama.held_out import UNSEEN_SCENES
from imprompt.evaluation import ablation
from imprompt.evaluation.catalogue import MEASUREMENTS
from imprompt.evaluation.judge import load_judge, read, shares, truth
from imprompt.evaluation.measure import Sampling, measure_adapter, measure_judge, unseen_scenes
from imprompt.evaluation.report import Report, line_chart, picture_rows, table
from imprompt.evaluation.run import Request, evaluate


def test_the_shipped_judge_reads_unseen_renders():
    figures = measure_judge(load_judge(), count=300)
    for attribute in ("kind", "colour", "style"):
        assert figures[attribute] >= 0.99, figures


def test_the_judge_is_not_always_right():
    scenes = unseen_scenes(24)
    judge = load_judge()
    noise = torch.randn(24, 3, 64, 64).clamp(-1, 1)
    assert shares(read(judge, noise), truth(scenes))["kind"] < 0.5
    shifted = render(scenes[1:] + scenes[:1]).pixels
    assert shares(read(judge, shifted), truth(scenes))["kind"] < 0.5


def test_unseen_scenes_are_objects_of_every_kind_beyond_the_training_seeds():
    scenes = unseen_scenes(24)
    assert {scene.kind for scene in scenes} == set(OBJECT_KINDS)
    assert all(scene.seed in UNSEEN_SCENES for scene in scenes)


def test_shares_count():
    found = {"kind": torch.tensor([1, 2, 3, 4]), "colour": torch.tensor([0, 0, 0, 0])}
    wanted = {"kind": torch.tensor([1, 2, 0, 0]), "colour": torch.tensor([0, 0, 0, 1])}
    assert shares(found, wanted) == {"kind": 0.5, "colour": 0.75}


def test_a_report_is_one_file_that_loads_nothing_and_escapes_text(tmp_path):
    report = Report("A <title>", "lead & more")
    report.numbers({"kept": "80%"})
    image = Image.new("RGB", (4, 4), "red")
    report.section(
        "Rows",
        "text",
        picture_rows([("one <b>", [image])], ["column"]),
        table(["a", "b"], [["x", "1"]]),
        line_chart({"line": [(0.0, 0.1), (1.0, 0.9)]}, x_name="λ", as_percent=True),
    )
    report.write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "&lt;title&gt;" in page and "one &lt;b&gt;" in page
    assert "data:image/png;base64," in page and "<svg" in page


def test_a_flat_line_can_be_drawn():
    assert "polyline" in line_chart({"flat": [(0.0, 0.5)]}, x_name="step")


@pytest.mark.parametrize("count", [1, 13])
def test_truth_has_a_row_per_scene(count):
    assert all(len(values) == count for values in truth(unseen_scenes(count)).values())


def test_the_ablation_trains_on_the_base_that_was_named(tmp_path, monkeypatch):
    folder = write_tiny_base(tmp_path / "bases" / "mine")
    given = []
    monkeypatch.setattr(ablation, "prepare", lambda source, output, base: given.append(base.name))

    def train(system, *, base, **options):
        given.append(base.name)
        raise ImpromptError("far enough")

    monkeypatch.setattr(ablation, "run_training", train)
    with pytest.raises(ImpromptError, match="far enough"):
        evaluate("ablation", Request(load=lambda: load_base(folder), count=1, output=tmp_path))
    assert given == ["mine", "mine"]


def test_a_base_without_image_encoder_is_told(tmp_path):
    base = load_base(write_tiny_base(tmp_path / "mine"))
    adapter = create_adapter(base.unet, feature_dim=8)
    base.image_encoder = None
    with pytest.raises(ImpromptError, match="mine has no image encoder"):
        measure_adapter(base, adapter, load_judge(), Sampling(steps=1), count=1)


def test_nothing_to_measure_is_told(tmp_path):
    def asked(count, **sampling):
        return Request(
            load=lambda: load_base("diorama"),
            count=count,
            output=tmp_path,
            sampling=Sampling(**sampling),
        )

    with pytest.raises(ImpromptError, match="count is 0, but must be at least 1"):
        evaluate("judge", asked(0))
    with pytest.raises(ImpromptError, match="steps is 0, but must be at least 1"):
        evaluate("judge", asked(1, steps=0))
    with pytest.raises(
        ImpromptError, match="no measurement 'jugde'; choose one of: adapter, base,"
    ):
        evaluate("jugde", asked(1))


@pytest.mark.parametrize("what", MEASUREMENTS)
def test_what_the_catalogue_names_is_there(what):
    assert callable(MEASUREMENTS[what].load())


@pytest.mark.parametrize("what", ["adapter", "base", "control", "identity", "ablation"])
def test_a_base_of_another_size_is_not_judged(what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_tiny_base(tmp_path / "mine")
    assert main(["evaluate", "--what", what, "--base", str(folder), "--count", "1"]) != 0
    told = capsys.readouterr().err
    assert "mine draws 32 px" in told and "previews/" in told


def test_figures_have_their_units():
    assert with_unit("all: landmark error in px", 0.8) == "0.80 px"
    assert with_unit("depth, ω = 1: keypoint error", 0.5) == "0.50 px"
    assert with_unit("decoupled: parameters", 1234567.0) == "1,234,567"
    assert with_unit("style: CLIP-T", 0.25) == "0.250"
    assert with_unit("kind kept, image alone", 0.8) == "80.0%"
