"""Control maps as columns: drawn from scenes, or read from folders of the user's own."""

import json

import pytest
import torch
from pair_files import captions
from PIL import Image

from imprompt.cli.main import main
from imprompt.core.errors import ImpromptError
from imprompt.data.dataset import Columns
from imprompt.data.prepare import prepare
from imprompt.data.records import Reading
from imprompt.diorama import draw_maps, render, sample_scene

SIZE = 32


def test_scenes_bring_their_maps_and_added_ones_are_the_same(base, tmp_path):
    at_once = tmp_path / "at once"
    names = ["text_ids", "control_depth", "control_segmentation"]
    prepare("diorama:5", at_once, base, columns=names)
    later = tmp_path / "later"
    prepare("diorama:5", later, base, columns=["text_ids"])
    prepare("diorama:5", later, base, columns=names)
    rows = [Columns.open(folder).rows(range(5), names) for folder in (at_once, later)]
    for name in names:
        assert torch.equal(rows[0][name], rows[1][name])
    drawn = render([sample_scene(seed) for seed in range(5)], SIZE)
    expected = (draw_maps(drawn, "depth") * 255).round().to(torch.uint8)
    assert torch.equal(rows[0]["control_depth"], expected)


@pytest.fixture
def photos(tmp_path):
    """Three photos; of one the map is missing, of one it has another shape."""
    for folder in ("photos", "photos/more", "depths", "depths/more"):
        (tmp_path / folder).mkdir()
    for number, name in enumerate(("a", "b", "more/c")):
        Image.new("RGB", (60, 40), (40 * number + 40, 0, 0)).save(tmp_path / f"photos/{name}.jpg")
        (tmp_path / f"photos/{name}.txt").write_text(f"photo {name[-1]}")
    left = Image.new("L", (60, 40), 0)
    left.paste(255, (0, 0, 30, 40))
    left.save(tmp_path / "depths/a.png")
    Image.new("L", (40, 60)).save(tmp_path / "depths/more/c.png")
    return tmp_path


def test_a_users_maps_lie_on_his_images(base, photos):
    reading = Reading(maps={"depth": photos / "depths"})
    columns = ["text_ids", "control_depth"]
    prepare(str(photos / "photos"), photos / "data", base, columns=columns, reading=reading)
    data = Columns.open(photos / "data")
    assert captions(data) == ["photo a"]
    found = data.rows([0], ["control_depth"])["control_depth"][0]
    assert found.shape == (3, SIZE, SIZE) and found.dtype == torch.uint8
    assert found[:, :, :14].min() > 250 and found[:, :, 18:].max() < 5
    lines = (photos / "data/quarantine.jsonl").read_text().splitlines()
    faults = {fault["pair"]: fault for fault in map(json.loads, lines)}
    assert faults["b.jpg"]["kind"] == "map missing" and "b.png" in faults["b.jpg"]["reason"]
    assert faults["more/c.jpg"]["kind"] == "map shape"


def test_mistakes_are_told(base, base_folder, photos, capsys):
    with pytest.raises(ImpromptError, match="`imprompt prepare` and give --map depth=FOLDER"):
        prepare(str(photos / "photos"), photos / "data", base, columns=["control_depth"])
    with pytest.raises(ImpromptError, match="no map 'ears'"):
        prepare("diorama:2", photos / "data2", base, columns=["control_ears"])
    with pytest.raises(ImpromptError, match="no column 'ears'.*control_keypoints"):
        prepare("diorama:2", photos / "data3", base, columns=["ears"])
    command = ["prepare", str(photos / "photos"), str(photos / "data4"), "--base", str(base_folder)]
    for option, message in (("depth", "KIND=FOLDER"), (f"depth={photos / 'none'}", "no folder")):
        assert main([*command, "--map", option]) == 2
        assert message in capsys.readouterr().err
