"""Pairs encoded at every step train as prepared ones do, faults and all."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_base import write_tiny_base

from imprompt.bases import load_base
from imprompt.core.errors import ImpromptError
from imprompt.data.dataset import Columns
from imprompt.data.on_the_fly import PairsOnTheFly
from imprompt.data.prepare import prepare
from imprompt.data.sources import open_source
from imprompt.evaluation.previews import preview_of
from imprompt.systems import image_prompt
from imprompt.training import log
from imprompt.training import run as run_module
from imprompt.training.processes import Processes
from imprompt.training.run import open_data, run_training

SETTINGS = [
    "train.steps=6",
    "train.batch_size=4",
    "train.learning_rate=0.001",
    "train.validation_rows=4",
    "train.validate_every_steps=3",
    "train.log_every_steps=1",
]
COLUMNS = ("latent_mean", "latent_logvar", "image_embeds", "text_ids")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, 20 photos, and the same prepared."""
    folder = tmp_path_factory.mktemp("pairs")
    write_tiny_base(folder / "base")
    (folder / "photos").mkdir()
    for number in range(20):
        values = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"photos/{number:02d}.png")
        (folder / f"photos/{number:02d}.txt").write_text(f"cat {number}")
    prepare(str(folder / "photos"), folder / "data", load_base(folder / "base"))
    return folder


def run(folder, data, output, *settings):
    return run_training(
        "image-prompt",
        data=data,
        base=str(folder / "base"),
        output=output,
        settings=[*SETTINGS, *settings],
        preview_of=preview_of,
    )


def test_rows_are_what_preparing_would_have_written(folder):
    base = load_base(folder / "base")
    live, prepared = PairsOnTheFly(str(folder / "photos"), base), Columns.open(folder / "data")
    assert len(live) == len(prepared) == 20
    assert live.meta["encoders_fingerprint"] == prepared.meta["encoders_fingerprint"]
    one, other = (data.rows([7, 3, 7], COLUMNS) for data in (live, prepared))
    for name in COLUMNS:
        assert one[name].dtype == other[name].dtype
        torch.testing.assert_close(one[name], other[name], atol=2e-3, rtol=2e-3)
    with pytest.raises(ImpromptError, match="no column 'nonsense'"):
        live.require(["nonsense"])


def test_training_on_a_source_is_training_on_what_is_prepared_of_it(folder, tmp_path):
    adapters = [
        load_file(run(folder, folder / data, tmp_path / data)) for data in ("photos", "data")
    ]
    for name in adapters[0]:
        torch.testing.assert_close(adapters[0][name], adapters[1][name], atol=3e-3, rtol=1e-2)
    losses = [
        [line["loss"] for line in log.read(tmp_path / d / "log.jsonl") if "loss" in line]
        for d in ("photos", "data")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    # What a run leaves to look at.
    picture = Image.open(tmp_path / "data/previews/step-00000006.png")
    assert picture.size == (4 * 32, 2 * 32)
    card = (tmp_path / "data/README.md").read_text()
    assert "learning_rate = 0.001" in card and "content_fingerprint" in card
    assert "loss with image" in card and "step-00000006.png" in card
    assert list((tmp_path / "data/tensorboard").glob("events*"))


def test_a_source_with_faults_trains_on_the_next_ones_and_goes_on_exactly(folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for file in (folder / "photos").iterdir():
        (photos / file.name).write_bytes(file.read_bytes())
    (photos / "05.png").write_bytes(b"not a picture")
    (photos / "11.txt").write_text("")
    straight = load_file(
        run(folder, photos, tmp_path / "straight", "train.checkpoint_every_steps=4")
    )
    listed = (tmp_path / "straight/quarantine.jsonl").read_text().splitlines()
    assert {json.loads(line)["pair"]: json.loads(line)["kind"] for line in listed} == {
        "05.png": "image damaged",
        "11.png": "caption empty",
    }
    # As killed after step 4:
    import shutil

    shutil.rmtree(tmp_path / "straight/checkpoints/step-00000006")
    again = load_file(run(folder, photos, tmp_path / "straight", "train.checkpoint_every_steps=4"))
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_a_row_is_stood_in_for_within_its_own_split(folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for file in (folder / "photos").iterdir():
        (photos / file.name).write_bytes(file.read_bytes())
    for name in ("15", "19"):  # the last to be trained on, and the last that is held out
        (photos / f"{name}.png").write_bytes(b"not a picture")
    live = PairsOnTheFly(str(photos), load_base(folder / "base"))
    live.hold_out(4)
    found = live.rows([15, 0, 19, 16], ["image_embeds"])["image_embeds"]
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])


def test_what_an_earlier_session_could_not_use_stays_listed(folder, tmp_path):
    live = PairsOnTheFly(str(folder / "photos"), load_base(folder / "base"))
    entries = [{"pair": f"{n:02d}.png", "kind": "image damaged", "reason": "x"} for n in range(3)]
    live.unusable = {0: entries[0], 2: entries[2]}
    live.write_unusable(tmp_path / "quarantine.jsonl")
    live.unusable = {1: entries[1], 2: entries[2]}
    live.write_unusable(tmp_path / "quarantine.jsonl")
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [entries[0], entries[2], entries[1]]


def test_what_a_system_begins_with_does_not_know_the_rows_held_out(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        image_prompt, "fit_to_captions", lambda projection, base, columns: seen.append(len(columns))
    )
    base = load_base(folder / "base")
    settings = ["train.steps=1", "train.validation_rows=4", "system.fit_to_captions=true"]
    run_module.prepare_run("image-prompt", base, Columns.open(folder / "data"), None, settings)
    assert seen == [16]


def table(path, num_rows, **options):
    """A Parquet file whose captions are the numbers of their rows."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    captions = [str(number) for number in range(num_rows)]
    columns = {"image": [file.getvalue()] * num_rows, "text": captions}
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_readers_side_by_side_each_get_the_row_they_asked_for(folder, tmp_path):
    base = load_base(folder / "base")
    live = PairsOnTheFly(str(table(tmp_path / "pairs.parquet", 4000)), base, readers=4)
    rows = np.random.default_rng(0).permutation(4000)[:96].reshape(8, 12)
    with ThreadPoolExecutor(2) as ahead:  # two batches are read at a time
        found = list(ahead.map(lambda some: live.fetch(some, ("text_ids",)), rows))
    for some, fetched in zip(rows, found, strict=True):
        assert torch.equal(fetched()["text_ids"], base.tokenize([str(row) for row in some]))
    assert not live.unusable


def test_rows_of_a_table_that_cannot_be_read_are_stood_in_for(folder, tmp_path):
    path = table(tmp_path / "pairs.parquet", 16, row_group_size=8)
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        second = file.metadata.row_group(1).column(0).dictionary_page_offset
    base = load_base(folder / "base")
    with open(path, "r+b") as file:
        file.seek(second)
        file.write(b"\xff" * 40)
    live = PairsOnTheFly(str(path), base)
    found = live.rows([14, 0, 9, 3], ["text_ids"])["text_ids"]
    assert torch.equal(found, base.tokenize(["0", "0", "0", "3"]))
    assert {entry["kind"] for entry in live.unusable.values()} == {"source damaged"}
    with pytest.raises(ImpromptError, match=r"pairs\.parquet cannot be read at row"):
        open_source(str(path))[0].pairs()[4:12]


def test_nothing_but_faults_is_an_error(folder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(b"no picture")
    with pytest.raises(ImpromptError, match=r"in a row cannot be used.*a\.png"):
        PairsOnTheFly(str(tmp_path / "photos"), load_base(folder / "base")).rows([0], COLUMNS)


def test_a_base_given_as_an_object_is_moved_to_where_the_run_computes(
    folder, tmp_path, monkeypatch
):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(run_module, "join_processes", lambda *_: Processes("single", 0, 1, device))
    base = load_base(folder / "base")
    moves = []
    monkeypatch.setattr(base, "to", lambda *to: moves.append(to))
    with pytest.raises(ImpromptError, match="no preset"):
        run_training("image-prompt", data=folder / "data", base=base, output=tmp_path, preset="x")
    assert moves == [(device,)]


def test_a_fine_tune_trains_on_the_same_data_but_does_not_go_on_with_a_run(folder, tmp_path):
    tuned = load_base(folder / "base")
    with torch.no_grad():
        for weight in tuned.unet.parameters():
            weight.neg_()
    options = {"data": folder / "data", "settings": SETTINGS}
    run_training("image-prompt", base=tuned, output=tmp_path / "tuned", **options)
    with pytest.raises(ImpromptError, match="base_fingerprint was"):
        run(folder, folder / "data", tmp_path / "tuned")


def test_scenes_and_what_is_neither(folder, tmp_path):
    base = load_base(folder / "base")
    assert len(open_data("diorama:9", base)) == 9
    with pytest.raises(ImpromptError, match="no such folder"):
        open_data(tmp_path / "nothing", base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImpromptError, match="holds no images"):
        open_data(tmp_path / "empty", base)
