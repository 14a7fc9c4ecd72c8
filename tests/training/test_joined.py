"""Several prepared folders train as one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_system import SmallSystem, write_numbers
from tiny_base import write_tiny_base

from imprompt.bases import load_base
from imprompt.core.errors import ImpromptError
from imprompt.data.dataset import Columns, ColumnsWriter
from imprompt.data.joined import JoinedColumns
from imprompt.training.config import TrainConfig
from imprompt.training.loop import train
from imprompt.training.run import open_data


def numbered(folder, first, count, **meta):
    """Prepared data whose rows know their number."""
    folder.mkdir()
    writer = ColumnsWriter(folder)
    x = torch.arange(first, first + count, dtype=torch.float32)[:, None]
    writer.write(0, {"x": x, f"only_{first}": x})
    writer.finish(count, {"source": f"numbers from {first}", "base": "b", **meta})
    return Columns.open(folder)


def test_rows_come_in_the_order_asked_for(tmp_path):
    joined = JoinedColumns(
        [
            numbered(tmp_path / "a", 0, 5),
            numbered(tmp_path / "b", 5, 3),
            numbered(tmp_path / "c", 8, 4),
        ]
    )
    assert len(joined) == 12
    asked = np.array([11, 0, 7, 5, 4, 5, -1, -12])
    for read in (joined.rows(asked, ["x"]), joined.fetch(asked, ["x"])()):
        assert read["x"][:, 0].tolist() == [11, 0, 7, 5, 4, 5, 11, 0]
    assert joined.rows([], ["x"])["x"].shape == (0, 1)
    with pytest.raises(IndexError, match="rows 0 to 11"):
        joined.rows([12], ["x"])


def test_columns_are_those_that_all_have(tmp_path):
    joined = JoinedColumns([numbered(tmp_path / "a", 0, 5), numbered(tmp_path / "b", 5, 3)])
    assert joined.names == ("x",)
    assert joined.meta["source"] == "numbers from 0 + numbers from 5"
    joined.require(["x"])
    with pytest.raises(ImpromptError, match="b lacks the column only_0"):
        joined.require(["only_0"])


def test_data_of_different_models_or_sizes_are_told_apart(tmp_path):
    first = numbered(tmp_path / "a", 0, 5, size_px=64)
    without_faces = numbered(tmp_path / "b", 5, 3, size_px=64)
    with_faces = numbered(tmp_path / "c", 8, 3, size_px=64, face_encoder="f")
    meta = JoinedColumns([first, without_faces, with_faces]).meta
    assert (meta["size_px"], meta["face_encoder"]) == (64, "f")  # whichever of them says it
    with pytest.raises(ImpromptError, match="its size_px is 32, not 64"):
        JoinedColumns([first, numbered(tmp_path / "d", 8, 3, size_px=32)])


def test_what_is_held_out_is_not_given_again(tmp_path):
    first, second = numbered(tmp_path / "a", 0, 5), numbered(tmp_path / "b", 5, 3)
    assert len(JoinedColumns([first, first, second])) == 13
    with pytest.raises(ImpromptError, match="b is given more than once and stands last"):
        JoinedColumns([second, first, Columns.open(tmp_path / "a" / ".." / "b")])


def test_a_run_sees_all_of_them_and_one_alone_is_itself(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        write_numbers(folder, 32)
    base = load_base(write_tiny_base(tmp_path / "base"))
    data = open_data(folders, base)
    config = TrainConfig(steps=40, batch_size=16, learning_rate=0.1, validation_rows=8)
    system = SmallSystem()
    train(system, data, config, tmp_path / "run")
    assert system.validate(data.rows(range(56, 64), ["x", "y"]), None)["error"] < 0.1
    assert open_data([folders[0]], base).path == folders[0]
    with pytest.raises(ImpromptError, match="Leave --face-encoder out"):
        open_data(folders, base, face_encoder="diorama")


def test_other_data_under_the_same_names_are_noticed(tmp_path):
    config = TrainConfig(steps=2, batch_size=4, validation_rows=8)

    def run():
        data = JoinedColumns([Columns.open(tmp_path / name) for name in "ab"])
        return train(SmallSystem(), data, config, tmp_path / "run")

    def describe(name, fingerprint):
        described = json.loads((tmp_path / name / "meta.json").read_text())
        described["content_fingerprint"] = fingerprint
        (tmp_path / name / "meta.json").write_text(json.dumps(described))

    for name in "ab":
        write_numbers(tmp_path / name, 16)
        describe(name, f"of {name}")
    run()
    describe("a", "of another")
    with pytest.raises(ImpromptError, match=r"content_fingerprint was 'of a \+ of b'"):
        run()
    kept = tmp_path / "run/run.json"
    described = json.loads(kept.read_text())
    del described["data"]["content_fingerprint"]  # as it was written before it was known of
    kept.write_text(json.dumps(described))
    run()


def test_vectors_of_faces_may_be_added_to_data_that_others_train_on(tmp_path):
    config = TrainConfig(steps=2, batch_size=4, validation_rows=8)
    (tmp_path / "data").mkdir()
    writer = ColumnsWriter(tmp_path / "data")
    ones = {"x": torch.ones(16, 3), "y": torch.ones(16, 1), "id_embeds": torch.ones(16, 2)}
    writer.write(0, ones)
    writer.finish(16, {"source": "numbers"})
    columns = Columns.open(tmp_path / "data")

    def run(output, *reads, **meta):
        system = SmallSystem()
        system.columns = ("x", "y", *reads)
        data = replace(columns, meta={**columns.meta, **meta})
        train(system, data, config, tmp_path / output)

    run("run")
    run("run", face_encoder="added")
    kept = tmp_path / "run/run.json"
    described = json.loads(kept.read_text())
    described["data"]["face_encoder"] = "added"  # as a run kept it that began when they were there
    kept.write_text(json.dumps(described))
    run("run", face_encoder="added")
    run("faces", "id_embeds", face_encoder="one")
    with pytest.raises(ImpromptError, match="face_encoder was 'one', now 'another'"):
        run("faces", "id_embeds", face_encoder="another")
