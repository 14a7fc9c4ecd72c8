"""Ten thousand pairs with faults of every kind: the good ones are prepared, each bad one is named."""

import json
import os
import tarfile

import pytest
from pair_files import add_member, captions, decompression_bomb, picture, write_pair

from imprompt.data.dataset import Columns
from imprompt.data.prepare import prepare

NUM_PAIRS = 10_000
NUM_FAULTS = 500


def write_photos(folder, number, bad):
    """Faulty pairs as files; `bad` maps names to the kind of fault expected."""
    for i in range(60):
        image = picture(number + i)
        write_pair(folder, f"cut{i}.png", image[: 40 + 8 * i], "cut off")
        bad[f"cut{i}.png"] = "image damaged"
        write_pair(folder, f"page{i}.jpg", b"<html>404 not found</html>" * (i + 1), "a page")
        bad[f"page{i}.jpg"] = "image damaged"
        write_pair(folder, f"silent{i}.png", image, b"" if i % 2 else b" \r\n\t")
        bad[f"silent{i}.png"] = "caption empty"
        write_pair(folder, f"latin{i}.png", image, b"caf\xe9 %d" % i)
        bad[f"latin{i}.png"] = "caption encoding"
        write_pair(folder, f"zz-twin{i}.png", picture(i), f"again {i}")
        bad[f"zz-twin{i}.png"] = "duplicate"
    for i in range(20):
        write_pair(folder, f"bomb{i}.png", decompression_bomb(60_000 + i), "a bomb")
        bad[f"bomb{i}.png"] = "image damaged"
        write_pair(folder, f"odd{i}.dat", picture(number + i), "a wrong extension")
        bad[f"odd{i}.txt"] = "image missing"
        (folder / f"lonely{i}.png").write_bytes(picture(number + i))
        bad[f"lonely{i}.png"] = "caption missing"
        (folder / f"loop{i}.png").symlink_to(f"loop{i}.png")
        (folder / f"loop{i}.txt").write_text("a circle")
        bad[f"loop{i}.png"] = "image missing"
        (folder / f"gone{i}.png").symlink_to("nowhere.png")
        bad[f"gone{i}.png"] = "image missing"
    for i in range(5):
        write_pair(folder, f"program{i}.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n", "a program")
        bad[f"program{i}.jpg"] = "image damaged"
        with open(folder / f"huge{i}.jpg", "wb") as file:
            file.truncate(1_000_000_000)
        (folder / f"huge{i}.txt").write_text("huge")
        bad[f"huge{i}.jpg"] = "image missing"
        write_pair(folder, f"novel{i}.png", picture(number + i), b"word " * 300_000)
        bad[f"novel{i}.png"] = "caption missing"
    os.mkfifo(folder / "pipe.png")
    (folder / "pipe.txt").write_text("waits for ever")
    bad["pipe.png"] = "image missing"
    os.symlink(folder, folder / "circle", target_is_directory=True)


def write_archive(path, number, bad):
    """An archive with what no honest program writes."""
    with tarfile.open(path, "w") as archive:
        for i in range(5):
            add_member(archive, f"../../evil{i}.jpg", picture(number + i))
            bad[f"{path.name}/../../evil{i}.jpg"] = "archive name"
            add_member(archive, f"/tmp/evil{i}.txt", b"evil")
            bad[f"{path.name}//tmp/evil{i}.txt"] = "archive name"
            add_member(archive, f"link{i}.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
            bad[f"{path.name}/link{i}.jpg"] = "archive link"
            add_member(archive, f"hard{i}.jpg", b"", type=tarfile.LNKTYPE, linkname="../x")
            bad[f"{path.name}/hard{i}.jpg"] = "archive link"
            add_member(archive, f"device{i}.jpg", b"", type=tarfile.CHRTYPE)
            bad[f"{path.name}/device{i}.jpg"] = "archive member"
            add_member(archive, f"cut{i}.jpg", picture(number + i)[:60])
            add_member(archive, f"cut{i}.txt", b"cut off")
            bad[f"{path.name}/cut{i}.jpg"] = "image damaged"
            add_member(archive, f"bytes{i}.jpg", picture(number + i))
            add_member(archive, f"bytes{i}.txt", b"\xff\xfe\x00")
            bad[f"{path.name}/bytes{i}.jpg"] = "caption encoding"
            add_member(archive, f"twin{i}.png", picture(1000 + i))
            add_member(archive, f"twin{i}.txt", b"again")
            bad[f"{path.name}/twin{i}.png"] = "duplicate"
        for i in range(3):
            add_member(archive, f"alone{i}.txt", b"no image")
            bad[f"{path.name}/alone{i}"] = "image missing"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A folder of photos and archives; the good captions; the bad names with their kinds."""
    folder = tmp_path_factory.mktemp("planted") / "photos"
    folder.mkdir()
    good, bad = [], {}
    write_photos(folder, NUM_PAIRS, bad)
    write_archive(folder / "b-hostile.tar", 2 * NUM_PAIRS, bad)
    # An archive that was cut off: what lies before is good.
    bad["c-cut.tar"] = "archive damaged"
    num_good = NUM_PAIRS - NUM_FAULTS
    for i in range(num_good // 2):
        write_pair(folder, f"{i}.png", picture(i), f"photo {i}")
        good.append(f"photo {i}")
    for name, numbers in (
        ("a.tar", range(num_good // 2, num_good - 10)),
        ("c-cut.tar", range(num_good - 10, num_good)),
    ):
        with tarfile.open(folder / name, "w") as archive:
            for i in numbers:
                add_member(archive, f"{i}.png", picture(i))
                add_member(archive, f"{i}.txt", f"archived {i}".encode())
                good.append(f"archived {i}")
            if name == "c-cut.tar":
                end = archive.offset
                add_member(archive, "last.png", bytes(5000))
    os.truncate(folder / "c-cut.tar", end + 1000)
    # A name that is no text is no fault.
    raw = os.fsencode(folder) + b"/\xff\xfe.png"
    os.rename(folder / "4000.png", raw)
    os.rename(folder / "4000.txt", raw.replace(b".png", b".txt"))
    for i in range(NUM_FAULTS - len(bad)):
        write_pair(folder, f"dot{i}.png", picture(i, side_px=1), "a dot")
        bad[f"dot{i}.png"] = "image too small"
    assert len(good) + len(bad) == NUM_PAIRS
    return folder, good, bad


def everything(folder):
    """All that lies under a folder, and when it was written."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(place, name)
            found[path] = (os.lstat(path).st_size, os.lstat(path).st_mtime_ns)
    return found


def test_all_good_pairs_are_prepared_and_every_bad_one_is_listed(planted, base, tmp_path):
    folder, good, bad = planted
    before, outside = everything(folder.parent), everything(tmp_path.parent)
    prepare(str(folder), tmp_path / "out", base, columns=("text_ids",))
    data = Columns.open(tmp_path / "out")
    assert sorted(captions(data)) == sorted(good)
    assert data.rows(range(len(data)), ["text_ids"])["text_ids"].shape[0] == len(good)
    lines = (tmp_path / "out/quarantine.jsonl").read_text().split("\n")[:-1]
    listed = [json.loads(line) for line in lines]
    found = {entry["pair"]: entry["kind"] for entry in listed}
    assert found == bad and len(listed) == len(bad)
    assert all(entry["reason"] for entry in listed)
    assert everything(folder.parent) == before
    new = {path for path in everything(tmp_path.parent) if path not in outside}
    assert all(path.startswith(str(tmp_path / "out")) for path in new)
