"""Captions and lists as other programs write them."""

import json

from PIL import Image
from test_sources import loaded

from imprompt.data.dataset import Columns
from imprompt.data.filters import Filters
from imprompt.data.prepare import prepare


def write(folder, name="a", size=(40, 40), text="a dog"):
    Image.effect_noise(size, 80).convert("RGB").save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def test_a_list_may_name_files_as_uris(tmp_path):
    (tmp_path / "my photos").mkdir()
    write(tmp_path / "my photos")
    record = {"image_file": (tmp_path / "my photos/a.png").as_uri(), "text": "a dog"}
    (tmp_path / "l.json").write_text(json.dumps([record]))
    assert loaded(tmp_path / "l.json") == (["a dog"], {})


def test_the_shorter_side_counts(tmp_path):
    write(tmp_path, size=(90, 20))
    assert loaded(tmp_path, filters=Filters(min_side_px=30))[1] == {"a.png": "image too small"}


def test_of_several_captions_the_first(tmp_path):
    write(tmp_path)
    (tmp_path / "l.json").write_text(
        json.dumps([{"image_file": "a.png", "captions": ["first", "second"]}])
    )
    assert loaded(tmp_path / "l.json") == (["first"], {})


def test_a_byte_order_mark_is_no_word(tmp_path):
    write(tmp_path, text="\ufeffa dog")
    assert loaded(tmp_path) == (["a dog"], {})


def test_a_byte_order_mark_is_no_column(tmp_path):
    write(tmp_path)
    (tmp_path / "l.csv").write_text("\ufefffile_name,text\na.png,tea\n", encoding="utf-8")
    assert loaded(tmp_path / "l.csv") == (["tea"], {})


def test_other_captions_are_other_data(base, tmp_path):
    found = []
    for text in ("a dog", "a cat"):
        (tmp_path / text).mkdir()
        Image.new("RGB", (40, 40), "red").save(tmp_path / text / "a.png")
        (tmp_path / text / "a.txt").write_text(text)
        found.append(
            Columns.open(prepare(str(tmp_path / text), tmp_path / f"data {text}", base)).meta[
                "content_fingerprint"
            ]
        )
    assert found[0] != found[1]


def test_hidden_copies_are_passed_over(tmp_path):
    write(tmp_path, text="a dog")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    write(tmp_path / ".ipynb_checkpoints", "a-checkpoint", text="an old caption")
    write(tmp_path, "._a", text="of a Mac")
    assert loaded(tmp_path) == (["a dog"], {})
