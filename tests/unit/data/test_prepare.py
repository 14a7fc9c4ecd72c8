"""Pairs to columns: every source, every fault, and going on after a kill."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pair_files import captions, contents, pairs_of
from PIL import Image

from imprompt.core import files
from imprompt.core.errors import ImpromptError
from imprompt.data import columns as columns_module
from imprompt.data import encoding
from imprompt.data import prepare as prepare_module
from imprompt.data.dataset import Columns
from imprompt.data.filters import Filters
from imprompt.data.pairs import load
from imprompt.data.prepare import prepare
from imprompt.diorama import gallery, sample_scene


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        values = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"caption {number}")
    return folder


def test_a_folder_with_faults_gives_the_good_ones_and_names_the_bad(base, photos, tmp_path):
    Image.new("RGB", (1, 1)).save(photos / "a-tiny.png")
    (photos / "a-tiny.txt").write_text("small")
    Image.new("RGB", (40, 40)).save(photos / "b-silent.png")
    (photos / "c-cut.png").write_bytes((photos / "0.png").read_bytes()[:200])
    (photos / "c-cut.txt").write_text("cut")
    (photos / "d-odd.txt").write_bytes(b"\xff\xfe\xfa")
    Image.new("RGB", (40, 40)).save(photos / "d-odd.png")
    Image.new("RGB", (40, 40)).save(photos / "e-blank.png")
    (photos / "e-blank.txt").write_text("  \n")
    data = Columns.open(prepare(str(photos), tmp_path / "data", base, batch_size=4))
    assert captions(data) == [f"caption {number}" for number in range(6)]
    lines = (tmp_path / "data/quarantine.jsonl").read_text().splitlines()
    reasons = {entry["pair"]: entry["reason"] for entry in map(json.loads, lines)}
    assert sorted(reasons) == [
        "a-tiny.png",
        "b-silent.png",
        "c-cut.png",
        "d-odd.png",
        "e-blank.png",
    ]
    assert "1 × 1" in reasons["a-tiny.png"] and "missing" in reasons["b-silent.png"]
    assert "UTF-8" in reasons["d-odd.png"] and "empty" in reasons["e-blank.png"]


def test_columns_hold_what_the_encoders_say(base, photos, tmp_path):
    data = Columns.open(prepare(str(photos), tmp_path / "data", base))
    assert data.names == ("image_embeds", "latent_logvar", "latent_mean", "text_ids")
    loaded = load(pairs_of(str(photos))[3], base.image_size_px)
    image, text = loaded.picture, loaded.caption
    from imprompt.core.images import image_to_pixels

    pixels = image_to_pixels(image)[None]
    row = data.rows([3], data.names)
    torch.testing.assert_close(
        row["image_embeds"].float(), base.image_encoder.embeds(pixels), atol=5e-3, rtol=5e-3
    )
    mean, deviation = base.latent_distribution(pixels)
    scale = base.vae.config.scaling_factor
    torch.testing.assert_close(row["latent_mean"].float() * scale, mean, atol=5e-3, rtol=5e-3)
    spread = (0.5 * row["latent_logvar"].float()).exp() * scale
    torch.testing.assert_close(spread, deviation, atol=5e-3, rtol=5e-3)
    assert torch.equal(row["text_ids"], base.tokenize([text]))


def test_the_autoencoder_sees_only_so_many_pixels_at_once(base, photos, tmp_path, monkeypatch):
    columns = ("latent_mean", "latent_logvar", "latents")
    whole = Columns.open(prepare(str(photos), tmp_path / "whole", base, columns=columns))
    seen, encode = [], base.latent_distribution
    monkeypatch.setattr(
        base, "latent_distribution", lambda pixels: seen.append(len(pixels)) or encode(pixels)
    )
    monkeypatch.setattr(columns_module, "PIXELS_AT_ONCE", 4 * base.image_size_px**2 + 1)
    parts = Columns.open(prepare(str(photos), tmp_path / "parts", base, columns=columns))
    assert seen == [4, 2]
    one, other = (data.rows(range(6), columns) for data in (whole, parts))
    for name in columns:
        torch.testing.assert_close(one[name], other[name], atol=2e-3, rtol=2e-3)


def test_the_json_list_of_the_original_scripts(base, photos, tmp_path):
    records = [{"image_file": f"photos/{n}.png", "text": f"text {n}"} for n in range(4)]
    records += [{"image_file": "../../etc/passwd", "text": "no"}, {"image_file": "photos/1.png"}]
    (tmp_path / "list.json").write_text(json.dumps(records))
    data = Columns.open(prepare(str(tmp_path / "list.json"), tmp_path / "data", base))
    assert captions(data) == [f"text {n}" for n in range(4)]
    rejected = (tmp_path / "data/quarantine.jsonl").read_text()
    assert "outside" in rejected and '"text\\" is missing' in rejected


@pytest.mark.parametrize("seconds", [0.0, 60.0])
@pytest.mark.parametrize("kill_at", [1, 2, 4])
def test_killed_and_started_again_the_result_is_the_same(
    base, photos, tmp_path, monkeypatch, kill_at, seconds
):
    (photos / "3.txt").unlink()
    monkeypatch.setattr(encoding, "SAVE_EVERY_SECONDS", seconds)
    prepare(str(photos), tmp_path / "straight", base, batch_size=1)
    original, calls = columns_module.text_ids, 0

    def killed(base, batch):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise KeyboardInterrupt
        return original(base, batch)

    monkeypatch.setitem(columns_module.COLUMNS, "text_ids", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(photos), tmp_path / "killed", base, batch_size=1)
    with pytest.raises(ImpromptError, match="unfinished"):
        Columns.open(tmp_path / "killed")
    monkeypatch.setitem(columns_module.COLUMNS, "text_ids", original)
    prepare(str(photos), tmp_path / "killed", base, batch_size=1)
    assert contents(tmp_path / "straight") == contents(tmp_path / "killed")


def test_duplicates_that_are_kept_are_kept_by_whoever_goes_on(base, photos, tmp_path, monkeypatch):
    for number in (2, 5):
        (photos / f"{number}.png").write_bytes((photos / "0.png").read_bytes())
    monkeypatch.setattr(encoding, "SAVE_EVERY_SECONDS", 0.0)
    options = {"columns": ("text_ids",), "batch_size": 1, "filters": Filters(duplicates="keep")}
    original = columns_module.text_ids

    def killed(base, batch):
        if batch.captions == ["caption 4"]:
            raise KeyboardInterrupt
        return original(base, batch)

    monkeypatch.setitem(columns_module.COLUMNS, "text_ids", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(photos), tmp_path / "data", base, **options)
    monkeypatch.setitem(columns_module.COLUMNS, "text_ids", original)
    assert len(Columns.open(prepare(str(photos), tmp_path / "data", base, **options))) == 6


class Bar:
    """What the bar of a preparation is told."""

    def __init__(self):
        self.total, self.steps = 0, []

    @contextmanager
    def __call__(self, total, *_, **__):
        self.total, self.steps = total, []
        yield self

    def update(self, count):
        self.steps += [count] if count else []

    def expect(self, count):
        self.total += count


def test_each_batch_of_added_columns_is_told(base, photos, tmp_path, monkeypatch):
    bar = Bar()
    monkeypatch.setattr(prepare_module, "progress", bar)
    (photos / "3.txt").unlink()  # it gets no row, but is a pair that is done with
    prepare(str(photos), tmp_path / "data", base, columns=("text_ids",), batch_size=2)
    assert (bar.total, bar.steps) == (6, [2, 2, 2])
    prepare(str(photos), tmp_path / "data", base, columns=("image_embeds",), batch_size=2)
    assert (bar.total, bar.steps) == (6, [2, 2, 2])


def test_of_rows_and_columns_added_at_once_each_pass_is_told(base, photos, tmp_path, monkeypatch):
    bar, original = Bar(), columns_module.text_ids
    monkeypatch.setattr(prepare_module, "progress", bar)
    monkeypatch.setattr(encoding, "SAVE_EVERY_SECONDS", 0.0)

    def killed(base, batch):
        if "caption 4" in batch.captions:
            raise KeyboardInterrupt
        return original(base, batch)

    monkeypatch.setitem(columns_module.COLUMNS, "text_ids", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(photos), tmp_path / "data", base, columns=("text_ids",), batch_size=2)
    monkeypatch.setitem(columns_module.COLUMNS, "text_ids", original)
    both = ("text_ids", "image_embeds")
    prepare(str(photos), tmp_path / "data", base, columns=both, batch_size=2)
    assert (bar.total, bar.steps) == (12, [4, 2, 2, 2, 2])


def test_the_same_again_returns_at_once_and_something_else_is_refused(base, photos, tmp_path):
    prepare("diorama:4", tmp_path / "data", base)
    begun = (tmp_path / "data/parts/00000/latent_mean.npy").stat().st_mtime_ns
    prepare("diorama:4", tmp_path / "data", base)
    assert (tmp_path / "data/parts/00000/latent_mean.npy").stat().st_mtime_ns == begun
    with pytest.raises(ImpromptError, match="'diorama:4', now 'diorama:5'"):
        prepare("diorama:5", tmp_path / "data", base)
    with pytest.raises(ImpromptError, match="no prepared data"):
        prepare("diorama:4", photos, base)


def test_a_folder_with_more_photos_is_told_and_its_name_may_be_spelled_otherwise(
    base, tmp_path, monkeypatch
):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 40), "red" if name == "a" else "blue").save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text("a square")
    prepare(str(photos), tmp_path / "data", base)
    monkeypatch.chdir(tmp_path)
    for same in ("photos", "photos/", "./photos", str(photos)):
        prepare(same, Path("data"), base)
    Image.new("RGB", (40, 40), "green").save(photos / "c.png")
    with pytest.raises(ImpromptError, match="source has changed .* new pairs alone"):
        prepare("photos", Path("data"), base)


def test_a_folder_in_which_nothing_was_prepared_may_be_used_otherwise(base, photos, tmp_path):
    with pytest.raises(ImpromptError, match="None of the"):
        prepare(str(photos), tmp_path / "data", base, filters=Filters(min_side_px=5000))
    assert (tmp_path / "data/quarantine.jsonl").stat().st_size
    with pytest.raises(ImpromptError, match="None of the"):
        prepare(str(photos), tmp_path / "data", base, variant="instruct")
    prepare(str(photos), tmp_path / "data", base)
    assert len(Columns.open(tmp_path / "data"))


def test_a_full_disk_is_told_before_work_is_done(base, tmp_path, monkeypatch):
    class Usage:
        free = 10

    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(ImpromptError, match="needs .* MB"):
        prepare("diorama:4", tmp_path / "data", base)


def test_nothing_usable_is_an_error(base, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ImpromptError, match="holds no images"):
        prepare(str(tmp_path / "photos"), tmp_path / "data", base)
    (tmp_path / "photos/x.png").write_text("no image")
    with pytest.raises(ImpromptError, match=r"None of the 1 pairs.*x\.png"):
        prepare(str(tmp_path / "photos"), tmp_path / "data2", base)


@pytest.mark.parametrize("source", ["diorama:", "diorama:0", "diorama:x", "diorama:3:-1", "a.csv"])
def test_what_is_no_source_is_told(source):
    with pytest.raises(ImpromptError):
        pairs_of(source)


@pytest.mark.parametrize(
    "source",
    [
        "diorama:10:999995",
        "diorama:2000000",
        "diorama-people:1:6000000",
        "diorama-instruct:1:5000004",
    ]
    + ["diorama-instruct/face:1:1000000"],
)
def test_what_is_kept_for_measuring_is_not_trained_on(source):
    with pytest.raises(ImpromptError, match="kept for measuring"):
        pairs_of(source)


def test_nobody_of_the_gallery_is_in_a_scene_to_train_on():
    seed = 7_002_290  # by chance it draws one of them
    scene, pair = sample_scene(seed), pairs_of(f"diorama:1:{seed}")[0]
    assert scene.character in gallery() and pair.image.character not in gallery()
    assert replace(pair.image, character=scene.character) == scene


def test_a_diorama_pair_is_a_function_of_its_seed():
    first, later = pairs_of("diorama:5:10"), pairs_of("diorama:2:13")
    assert first[3].read_caption() == later[0].read_caption()
    assert first[3].image == later[0].image


@pytest.mark.parametrize(
    ("variant", "feature"), [("plus", "hidden_states"), ("full", "hidden_states")]
)
def test_each_variant_has_its_features(base, tmp_path, variant, feature):
    data = Columns.open(prepare("diorama:3", tmp_path / "data", base, variant=variant))
    assert feature in data.names and "image_embeds" not in data.names


def test_rows_come_in_the_order_asked_for(base, tmp_path):
    columns = ("pixels", "labels", "phrasing_ids", "latents")
    data = Columns.open(prepare("diorama:6", tmp_path / "data", base, columns=columns))
    all_rows = data.rows(range(6), columns)
    some = data.rows([4, 0, 4], columns)
    for name in columns:
        assert torch.equal(some[name], all_rows[name][[4, 0, 4]])
    with pytest.raises(ImpromptError, match="lacks the column image_embeds"):
        data.require(["image_embeds"])


def test_unknown_columns_and_variants_are_told(base, tmp_path):
    with pytest.raises(ImpromptError, match="no column 'depth'"):
        prepare("diorama:3", tmp_path / "data", base, columns=("depth",))
    with pytest.raises(ImpromptError, match="'portrait' is unknown"):
        prepare("diorama:3", tmp_path / "data", base, variant="portrait")
