"""Every kind of source gives the same pairs; each filter keeps what it says."""

import json
import tarfile

import pytest
from pair_files import add_member, decompression_bomb, pairs_of, picture, write_pair
from PIL import Image

from imprompt.core.errors import ImpromptError
from imprompt.data.filters import Filters, ScoreLimit, Unusable
from imprompt.data.pairs import load
from imprompt.data.records import Reading
from imprompt.data.sources import open_source

NUM_PAIRS = 5


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(NUM_PAIRS):
        write_pair(folder, f"{i}.png", picture(i), f"caption {i}")
    return folder


def loaded(source, reading=None, filters=None):
    """Captions of the pairs that can be used, and kinds of fault of the others, by name."""
    good, bad = [], {}
    for part in open_source(str(source), reading):
        pairs = part.pairs()
        for pair in pairs[0 : len(pairs)]:
            try:
                good.append(load(pair, 16, filters).caption)
            except Unusable as fault:
                bad[pair.name] = fault.kind
    return good, bad


CAPTIONS = [f"caption {i}" for i in range(NUM_PAIRS)]


def test_an_archive_of_img2dataset(tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for i in range(NUM_PAIRS):
            add_member(archive, f"0000{i}.jpg", picture(i, form="JPEG"))
            add_member(archive, f"0000{i}.txt", f"caption {i}".encode())
            record = {"caption": f"caption {i}", "url": "https://x.org", "aesthetic": 4 + i}
            add_member(archive, f"0000{i}.json", json.dumps(record).encode())
    (tmp_path / "00000.parquet").write_bytes(b"what img2dataset leaves beside it is not read")
    assert loaded(tmp_path) == (CAPTIONS, {})
    assert loaded(tmp_path / "00000.tar") == (CAPTIONS, {})
    assert loaded(tmp_path / "00000.tar", Reading(caption_key="url"))[0] == ["https://x.org"] * 5
    good, bad = loaded(tmp_path, filters=Filters(scores=(ScoreLimit.parse("aesthetic >= 6.5"),)))
    assert good == CAPTIONS[3:] and set(bad.values()) == {"score aesthetic"}


def test_an_archive_whose_members_are_mixed_and_named_like_webdataset(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(NUM_PAIRS):
            add_member(archive, f"./deep/{i}.txt", f"caption {i}".encode())
        for i in range(NUM_PAIRS):
            add_member(archive, f"./deep/{i}.PNG", picture(i))
            add_member(archive, f"./deep/{i}.cls", b"7")
    assert loaded(tmp_path / "a.tar") == (CAPTIONS, {})


@pytest.mark.parametrize("damage", ["header", "junk", "empty"])
def test_a_damaged_archive_gives_what_comes_before(tmp_path, damage):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(NUM_PAIRS):
            add_member(archive, f"{i}.png", picture(i))
            add_member(archive, f"{i}.txt", f"caption {i}".encode())
        end = archive.offset
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[end:] = b"\xff" * 2000
    elif damage == "junk":
        content = bytearray(b"no archive at all" * 100)
    else:
        content = bytearray()
    path.write_bytes(content)
    good, bad = loaded(path)
    assert good == (CAPTIONS if damage == "header" else [])
    assert bad == {"a.tar": "archive damaged"}


def test_compressed_archives_are_told_what_to_do(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ImpromptError, match="decompress"):
        open_source(str(tmp_path / "a.tar.gz"))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_lists_of_paths(photos, tmp_path, suffix):
    records = [{"file_name": f"photos/{i}.png", "TEXT": f"caption {i}"} for i in range(NUM_PAIRS)]
    records += [
        {"file_name": "../outside.png", "TEXT": "no"},
        {"file_name": "photos/gone.png", "TEXT": "no"},
        {"file_name": "", "TEXT": "no"},
    ]
    path = tmp_path / f"list{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps([*records, "nonsense"]))
    elif suffix == ".jsonl":
        path.write_text("\n".join([json.dumps(record) for record in records] + ["{nonsense"]))
    elif suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=3)
    else:
        mark = "," if suffix == ".csv" else "\t"
        lines = ["file_name" + mark + "TEXT"]
        lines += [record["file_name"] + mark + record["TEXT"] for record in records]
        path.write_text("\n".join([*lines, mark.join("abc")]))
    good, bad = loaded(path)
    assert good == CAPTIONS
    expected = ["entry", "image missing", "image outside"]
    assert sorted(bad.values()) == (expected if suffix == ".parquet" else ["entry", *expected])
    good, bad = loaded(path, Reading(image_root=tmp_path.parent))
    assert not good


def test_a_list_without_images_says_what_it_has(tmp_path):
    (tmp_path / "laion.csv").write_text("URL,TEXT\nhttps://x.org/a.jpg,a dog\n")
    with pytest.raises(ImpromptError, match="img2dataset"):
        open_source(str(tmp_path / "laion.csv"))
    (tmp_path / "odd.json").write_text('[{"picture": "a.png", "says": "a dog"}]')
    with pytest.raises(ImpromptError, match="picture, says.*--image-key"):
        open_source(str(tmp_path / "odd.json"))
    write_pair(tmp_path, "a.png", picture(0), None)
    reading = Reading(image_key="picture", caption_key="says")
    assert loaded(tmp_path / "odd.json", reading) == (["a dog"], {})
    with pytest.raises(ImpromptError, match="no column 'photo'"):
        open_source(str(tmp_path / "odd.json"), Reading(image_key="photo"))


def test_captions_that_are_no_text(photos, tmp_path):
    content = json.dumps([{"image": "photos/0.png", "text": "\ud800 half"}]).encode()
    (tmp_path / "list.json").write_bytes(content)
    assert loaded(tmp_path / "list.json")[1] == {"photos/0.png": "caption encoding"}
    (tmp_path / "list.csv").write_bytes(b"image,text\nphotos/0.png,caf\xe9\nphotos/1.png,tea\n")
    assert loaded(tmp_path / "list.csv") == (["tea"], {"photos/0.png": "caption encoding"})


def test_parquet_with_images_in_it(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"image": {"bytes": picture(i), "path": f"{i}.png"}, "text": f"caption {i}"}
        for i in range(NUM_PAIRS)
    ]
    for number, some in enumerate((rows[:3], rows[3:])):
        table = pyarrow.Table.from_pylist(some)
        parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=2)
    assert loaded(tmp_path) == (CAPTIONS, {})
    pairs = open_source(str(tmp_path / "0.parquet"))[0].pairs()
    assert [load(pairs[i], 16).caption for i in (2, 0, 1)] == [CAPTIONS[i] for i in (2, 0, 1)]


def test_a_row_without_a_path_has_the_image_in_it(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write_pair(tmp_path, "0.png", picture(0), None)
    rows = [
        {"image_file": "0.png", "image": None, "text": CAPTIONS[0]},
        {"image_file": None, "image": {"bytes": picture(1), "path": None}, "text": CAPTIONS[1]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    assert loaded(tmp_path / "pairs.parquet") == (CAPTIONS[:2], {})


@pytest.mark.parametrize("embedded", ["nothing", "image", "everything"])
def test_a_table_has_all_that_a_list_has(tmp_path, embedded):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for i in range(3):
        write_pair(tmp_path, f"{i}.png", picture(i), None)

    def stored(i, with_bytes):
        return {"bytes": picture(i) if with_bytes else None, "path": f"{i}.png"}

    def other(i):
        return stored(i, True) if embedded == "everything" else f"{i}.png"

    row = {
        "image": stored(0, embedded != "nothing"),
        "text": "not this one",
        "blip": "a caption",
        "reference_file": other(1),
        "condition_image": other(2),
        "instruction": "use the style",
        "task": "style",
    }
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "pairs.parquet")
    (tmp_path / "list.json").write_text(
        json.dumps(
            [row | {"image": "0.png", "reference_file": "1.png", "condition_image": "2.png"}]
        )
    )
    of_table, of_list = (
        load(
            open_source(str(tmp_path / name), Reading(caption_key="blip"))[0].pairs()[0],
            16,
            with_condition=True,
        )
        for name in ("pairs.parquet", "list.json")
    )
    assert of_table.caption == "a caption" and of_table.content == of_list.content
    assert of_table.reference == of_list.reference is not None
    assert of_table.condition_picture == of_list.condition_picture is not None
    assert (of_table.condition.instruction, of_table.condition.task) == ("use the style", "style")


def test_files_beside_an_embedded_image_may_not_lie_outside(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    row = {"image": picture(0), "text": "a", "reference_file": "../b.png"}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "pairs.parquet")
    assert loaded(tmp_path / "pairs.parquet")[1] == {"pairs.parquet row 0": "image outside"}


def test_a_dataset_on_disk(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    folder = tmp_path / "dataset"
    folder.mkdir()
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    files = []
    for number, some in enumerate((range(3), range(3, NUM_PAIRS))):
        name = f"data-{number:05d}-of-00002.arrow"
        images = [{"bytes": picture(i), "path": None} for i in some]
        table = pyarrow.table(
            {"image": pyarrow.array(images, kind), "text": [f"caption {i}" for i in some]}
        )
        with pyarrow.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
        files.append({"filename": name})
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    assert loaded(folder) == (CAPTIONS, {})
    (tmp_path / "both").mkdir()
    (tmp_path / "both/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ImpromptError, match="both/train"):
        open_source(str(tmp_path / "both"))


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        (Filters(min_side_px=30), ["wide", "large"]),
        (Filters(max_aspect=1.5), ["small", "large"]),
        (Filters(min_caption_characters=5), ["small", "large"]),
        (Filters(max_caption_characters=4), ["wide"]),
        (Filters(scores=(ScoreLimit.parse("punsafe<0.5"),)), ["small"]),
    ],
)
def test_filters(tmp_path, filters, kept):
    sizes = {"small": (20, 20), "wide": (90, 40), "large": (50, 40)}
    for number, (name, size) in enumerate(sizes.items()):
        Image.new("RGB", size, (number, 0, 0)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "small.json").write_text('{"punsafe": 0.1}')
    (tmp_path / "wide.json").write_text('{"punsafe": 0.9}')
    good, bad = loaded(tmp_path, filters=filters)
    assert sorted(good) == sorted(kept) and len(bad) == 3 - len(kept)


@pytest.mark.parametrize("text", ["aesthetic", "aesthetic=5", ">=5", "aesthetic>=high", ""])
def test_limits_that_cannot_be_read_are_told(text):
    with pytest.raises(ImpromptError, match="no limit"):
        ScoreLimit.parse(text)


@pytest.mark.parametrize(
    "options",
    [
        {"duplicates": "some"},
        {"min_side_px": 0},
        {"max_aspect": 0.5},
        {"min_caption_characters": 9, "max_caption_characters": 3},
    ],
)
def test_filters_that_cannot_be_are_told(options):
    with pytest.raises(ImpromptError):
        Filters(**options)


def test_a_decoder_that_fails_in_any_way_stops_nothing(tmp_path, monkeypatch):
    write_pair(tmp_path, "a.png", picture(0), "a")
    write_pair(tmp_path, "b.png", decompression_bomb(), "b")

    def broken(*arguments, **options):
        raise MemoryError("no")

    assert loaded(tmp_path) == (["a"], {"b.png": "image damaged"})
    monkeypatch.setattr("imprompt.data.pairs.open_image", broken)
    assert loaded(tmp_path) == ([], {"a.png": "image damaged", "b.png": "image damaged"})


def test_the_same_source_lists_the_same_parts(photos, monkeypatch):
    monkeypatch.setattr("imprompt.data.sources.PAIRS_PER_PART", 2)
    parts = open_source(str(photos))
    assert [part.num_pairs for part in parts] == [2, 2, 1]
    assert [part.identity for part in parts] == [p.identity for p in open_source(str(photos))]
    assert [pair.name for pair in pairs_of(str(photos))] == [f"{i}.png" for i in range(5)]
    write_pair(photos, "1b.png", picture(9), "new")
    changed = [part.identity for part in open_source(str(photos))]
    assert changed[0] == parts[0].identity and changed[1] != parts[1].identity
