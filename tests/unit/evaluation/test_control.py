"""The measurement of controls: every row is there, and what is measured is what was generated."""

import pytest
import torch

from imprompt.bases import load_base
from imprompt.bases.diorama import diorama_folder
from imprompt.checkpoints import LoadedControl, load_adapter
from imprompt.cli.main import main
from imprompt.core.shipped import ADAPTERS, shipped
from imprompt.evaluation.control import measure_controls, table, unlike
from imprompt.evaluation.judge import load_judge
from imprompt.evaluation.measure import Sampling, unseen_scenes
from imprompt.evaluation.run import Request, evaluate
from imprompt.systems.controlnet import create_controlnet
from imprompt.systems.map_reader import MapReader
from imprompt.systems.t2i_adapter import create_t2i_adapter


def test_rows_of_two_controls():
    base = load_base("diorama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = MapReader(width=4).eval()
    controls = {
        "edges": LoadedControl(create_controlnet(base).eval()),
        "depth": LoadedControl(create_t2i_adapter(base).eval()),
    }
    sampling = Sampling(steps=1, guidance_scale=1.0, sampler="ddim")
    scenes, asked, rows = measure_controls(
        base, controls, reader, load_judge(), sampling, count=2, weights=(1.0,)
    )
    assert [row.name for row in rows] == [
        "the renders themselves",
        "no control",
        "edges, ω = 1",
        "depth, ω = 1",
        "edges and depth",
    ]
    assert len(scenes) == 2 and torch.equal(rows[0].images, asked.pixels)
    # A new ControlNet adds nothing, so its row is the one without control; the other's is not.
    by_name = {row.name: row for row in rows}
    torch.testing.assert_close(by_name["edges, ω = 1"].images, by_name["no control"].images)
    assert not torch.allclose(by_name["depth, ω = 1"].images, by_name["no control"].images)
    assert by_name["edges, ω = 1"].figures == pytest.approx(by_name["no control"].figures, rel=1e-3)
    assert by_name["the renders themselves"].figures["object"] == 1
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and "100.0 %" in lines[2]


def test_controls_are_used_in_the_base_s_precision():
    base = load_base("diorama", dtype=torch.bfloat16)
    controls = {"depth": LoadedControl(create_t2i_adapter(base).eval())}
    sampling = Sampling(steps=1, guidance_scale=1.0, sampler="ddim")
    _, _, rows = measure_controls(
        base, controls, MapReader(width=4).eval(), load_judge(), sampling, count=1, weights=(1.0,)
    )
    assert rows[-1].images.isfinite().all()


def test_image_prompts_beside_a_control():
    base = load_base("diorama")
    controls = {"depth": LoadedControl(create_t2i_adapter(base).eval())}
    reader = MapReader(width=4).eval()
    sampling = Sampling(steps=1, guidance_scale=2.0)
    adapter = load_adapter(shipped(ADAPTERS["diorama"]))

    def measured(scale):
        _, _, rows = measure_controls(
            base, controls, reader, load_judge(), sampling,
            count=2, weights=(), adapter=adapter, image_scale=scale,
        )  # fmt: skip
        assert [row.name for row in rows][2:] == ["image prompt", "depth and image prompt"]
        assert all(row.images.isfinite().all() for row in rows)
        return rows[2].images, rows[3].images

    alone, both = measured(1.0)
    silent, control_alone = measured(0.0)
    for first, second in ((alone, both), (alone, silent), (both, control_alone)):
        assert not torch.allclose(first, second)


@pytest.mark.parametrize("is_embedded", [True, False])
def test_image_prompts_are_measured_on_the_embedded_base(is_embedded, tmp_path):
    figures = evaluate(
        "control",
        Request(
            load=lambda: load_base("diorama" if is_embedded else diorama_folder()),
            count=2,
            output=tmp_path,
            sampling=Sampling(steps=1, guidance_scale=2.0),
        ),
    )
    names = {name.split(": ")[0] for name in figures}
    assert {"no control", "segmentation and depth"} <= names
    beside = {"image prompt", "segmentation and depth and image prompt"}
    assert names & beside == (beside if is_embedded else set())


def test_image_prompts_show_other_objects_in_other_looks():
    scenes = unseen_scenes(24)
    for scene, reference in zip(scenes, unlike(scenes), strict=True):
        for attribute in ("kind", "style", "colour"):
            assert getattr(scene, attribute) != getattr(reference, attribute)


def test_mistakes_of_the_command_line(capsys):
    assert main(["evaluate", "--what", "control", "--control-model", "depth"]) == 2
    assert "KIND=FOLDER" in capsys.readouterr().err
