"""The store: the same bytes after any kill and with any number of processes; columns added; memory."""

import json
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from pair_files import add_member, captions, contents, picture, write_pair

from imprompt.core.errors import ImpromptError
from imprompt.core.files import write_json
from imprompt.data import dataset, sources
from imprompt.data.dataset import Columns
from imprompt.data.filters import Filters
from imprompt.data.prepare import prepare
from imprompt.data.store import GrowingColumn, write_array
from imprompt.data.workers import device_of_worker

COLUMNS = ("image_embeds", "text_ids")
PAIRS_PER_PART = 20


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A hundred pairs; some are broken, and some repeat one in the same or in another part."""
    folder = tmp_path_factory.mktemp("source") / "photos"
    folder.mkdir()
    for i in range(100):
        number = {33: 31, 58: 12, 99: 12}.get(i, i)
        image = picture(number) if i % 17 else b"broken"
        write_pair(folder, f"{i:03d}.png", image, f"photo {i}")
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(sources, "PAIRS_PER_PART", PAIRS_PER_PART)


@pytest.fixture
def straight(photos, base, tmp_path, small_parts):
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes that are compared with it: sums depend on it
    yield prepare(str(photos), tmp_path / "straight", base, columns=COLUMNS, batch_size=8)
    torch.set_num_threads(num_threads)


def test_parts_are_one_whole(straight, photos, base, tmp_path, monkeypatch):
    data = Columns.open(straight)
    broken, repeated = {i for i in range(100) if i % 17 == 0}, {33, 58, 99}
    kept = [i for i in range(100) if i not in broken | repeated]
    assert captions(data) == [f"photo {i}" for i in kept]
    # Only the duplicates of other parts have rows that do not count.
    assert np.load(straight / "removed.npy").tolist() == [58 - 5, 99 - 7]
    lines = (straight / "quarantine.jsonl").read_text().splitlines()
    reasons = {entry["pair"]: entry["reason"] for entry in map(json.loads, lines)}
    assert set(reasons) == {f"{i:03d}.png" for i in broken | repeated}
    assert reasons["033.png"].endswith("031.png") and reasons["099.png"].endswith("012.png")
    monkeypatch.setattr(sources, "PAIRS_PER_PART", 1000)
    one = Columns.open(prepare(str(photos), tmp_path / "one", base, columns=COLUMNS, batch_size=8))
    order = np.random.default_rng(0).permutation(len(data))
    for name in COLUMNS:
        rows = data.rows(order, [name])[name]
        torch.testing.assert_close(rows, one.rows(order, [name])[name], atol=2e-3, rtol=2e-3)
    assert one.meta["content_fingerprint"] == data.meta["content_fingerprint"]


def test_kept_duplicates_and_those_with_other_captions(photos, base, tmp_path, small_parts):
    for duplicates in ("pair", "keep"):
        filters = Filters(duplicates=duplicates)
        out = tmp_path / duplicates
        prepare(str(photos), out, base, columns=("text_ids",), filters=filters)
        assert len(Columns.open(out)) == 100 - 6


KILLING = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from imprompt.bases import load_base
from imprompt.data import encoding, sources
from imprompt.data.prepare import prepare
sources.PAIRS_PER_PART, encoding.SAVE_EVERY_SECONDS = {pairs_per_part}, 0.01
base, out, choose = load_base({base!r}), Path({out!r}), random.Random(0)
# This process only forks: one that had prepared would have threads, whose locks children could not get.
def begin(shard, num_shards, out):
    child = os.fork()
    if child == 0:
        sys.stderr = open(os.devnull, "w")
        prepare({source!r}, out, base, columns={columns!r}, batch_size=8,
                shard=shard, num_shards=num_shards)
        os._exit(0)
    return child
def ended(child):
    return os.waitpid(child, 0)[1]
began = time.monotonic()
assert ended(begin(0, 1, Path({out!r} + "-timed"))) == 0
whole = time.monotonic() - began
num_kills = 0
while num_kills < {num_kills}:
    children = [begin(shard, {num_shards}, out) for shard in range({num_shards})]
    time.sleep(choose.uniform(0, 0.4 * whole))
    for child in children:
        os.kill(child, signal.SIGKILL)
    killed = [ended(child) == signal.SIGKILL for child in children]
    num_kills += any(killed)
    if not any(killed):  # it came to its end: begin anew
        shutil.rmtree(out)
for child in [begin(shard, {num_shards}, out) for shard in range({num_shards})]:
    assert ended(child) == 0
"""


@pytest.mark.parametrize(("num_shards", "num_kills"), [(1, 10), (2, 4)])
def test_killed_at_any_moment_the_result_is_the_same(
    straight, photos, base_folder, tmp_path, num_shards, num_kills
):
    script = KILLING.format(
        base=str(base_folder),
        out=str(tmp_path / "killed"),
        source=str(photos),
        columns=COLUMNS,
        pairs_per_part=PAIRS_PER_PART,
        num_shards=num_shards,
        num_kills=num_kills,
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sources.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "killed") == contents(straight)


@pytest.fixture
def archives(tmp_path):
    """Three archives, which are three parts to any process; two pairs repeat one of another's."""
    folder = tmp_path / "archives"
    folder.mkdir()
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for i in range(8):
                image = picture(3 if i == 5 else 10 * number + i)
                add_member(archive, f"{i}.png", image)
                add_member(archive, f"{i}.txt", f"archive {number} photo {i}".encode())
    return str(folder)


def test_workers_give_what_one_process_gives(base, archives, tmp_path):
    options = {"columns": COLUMNS, "batch_size": 4}
    prepare(archives, tmp_path / "one", base, **options)
    prepare(archives, tmp_path / "two", base, workers=2, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_stops_a_worker_is_told(base, archives, tmp_path):
    prepare(archives, tmp_path / "out", base, columns=COLUMNS)
    archive = Path(archives) / "1.tar"
    content = archive.read_bytes()
    archive.write_bytes(content.replace(picture(14), picture(15)))
    with pytest.raises(ImpromptError, match=r"1\.tar/4\.png is not what it was"):
        prepare(archives, tmp_path / "out", base, columns=("latents",), workers=2)


def test_shards_finish_together(straight, photos, base, tmp_path, capsys, small_parts):
    options = {"columns": COLUMNS, "batch_size": 8, "num_shards": 2}
    out = tmp_path / "out"
    prepare(str(photos), out, base, shard=1, **options)
    assert "others are still at work" in capsys.readouterr().err
    with pytest.raises(ImpromptError, match="unfinished"):
        Columns.open(out)
    prepare(str(photos), out, base, shard=0, **options)
    assert contents(out) == contents(straight)
    with pytest.raises(ImpromptError, match="no shard 2 of 2"):
        prepare(str(photos), out, base, shard=2, **options)


def test_a_column_added_later_is_what_it_would_have_been(straight, photos, base, tmp_path):
    before = contents(straight)
    both = prepare(
        str(photos),
        tmp_path / "both",
        base,
        columns=(*COLUMNS, "latents"),
        batch_size=8,
    )
    prepare(str(photos), straight, base, columns=("latents",), batch_size=8)
    after = contents(straight)
    changed = {name for name in before if before[name] != after[name]}
    assert all(name.endswith(("progress.json", "meta.json")) for name in changed)
    assert {**after, "begun.json": b""} == {**contents(both), "begun.json": b""}
    assert Columns.open(straight).names == ("image_embeds", "latents", "text_ids")
    # What training compares when it goes on does not change with columns it does not read.
    assert "columns" not in Columns.open(straight).meta


def test_a_column_is_not_added_to_rows_of_other_pictures(base, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        write_pair(folder, f"{i}.png", picture(i), f"photo {i}")
    prepare(str(folder), tmp_path / "out", base, columns=("text_ids",))
    (folder / "1.png").write_bytes(picture(7))
    with pytest.raises(ImpromptError, match=r"1\.png is not what it was"):
        prepare(str(folder), tmp_path / "out", base, columns=("latents",))
    write_pair(folder, "1a.png", picture(8), "new")
    with pytest.raises(ImpromptError, match="source has changed"):
        prepare(str(folder), tmp_path / "out", base, columns=("latents",))


def test_damage_is_told(straight):
    file = straight / "parts/00001/text_ids.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ImpromptError, match="damaged.*00001/text_ids.*Prepare it again"):
        Columns.open(straight)
    file.unlink()
    with pytest.raises(ImpromptError, match="damaged"):
        Columns.open(straight)
    with pytest.raises(IndexError):
        file.write_bytes(whole)
        Columns.open(straight).rows([1000], ["text_ids"])


def test_files_are_plain_numpy_files(straight):
    parts = [np.load(part / "text_ids.npy") for part in sorted((straight / "parts").iterdir())]
    stored = np.concatenate(parts)
    kept = np.delete(stored, np.load(straight / "removed.npy"), axis=0)
    data = Columns.open(straight)
    assert np.array_equal(data.rows(range(len(data)), ["text_ids"])["text_ids"].numpy(), kept)


def test_another_process_gets_its_own_access(straight):
    data = Columns.open(straight)
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(
        again.rows([5, 2], ["text_ids"])["text_ids"], data.rows([5, 2], ["text_ids"])["text_ids"]
    )


def test_threads_read_at_the_same_time(straight, monkeypatch):
    data, read = Columns.open(straight), os.preadv
    both_read = Barrier(2)

    def waiting(*arguments):
        both_read.wait(timeout=20)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", waiting)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda i: data.rows([i], ["text_ids"])["text_ids"], (3, 60))
    monkeypatch.undo()
    assert torch.equal(torch.cat([first, second]), data.rows([3, 60], ["text_ids"])["text_ids"])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to see open files")
def test_a_file_that_is_read_stays_open_and_few_others_do(straight, monkeypatch):
    monkeypatch.setattr(dataset, "_max_open_files", lambda: 2)
    before = len(os.listdir("/proc/self/fd"))
    data, read = Columns.open(straight), os.preadv
    whole = data.rows(range(len(data)), ["text_ids"])["text_ids"]
    assert len(os.listdir("/proc/self/fd")) == before + 2

    def others_meanwhile(*arguments):
        monkeypatch.setattr(os, "preadv", read)
        data.rows(
            range(30, len(data)), ["text_ids"]
        )  # of three files, so that the first is dropped
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", others_meanwhile)
    assert torch.equal(data.rows([0], ["text_ids"])["text_ids"], whole[:1])
    del data
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_is_away_for_a_while_ends_no_run(straight, monkeypatch):
    data, read = Columns.open(straight), os.preadv
    monkeypatch.setattr(dataset, "SECONDS_BEFORE_TRIES", (0.0, 0.0))
    failures = iter([OSError(116, "Stale file handle"), OSError(5, "Input/output error")])

    def failing(*arguments):
        if (error := next(failures, None)) is not None:
            raise error
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    rows = data.rows([3], ["text_ids"])["text_ids"]
    monkeypatch.undo()
    assert torch.equal(rows, data.rows([3], ["text_ids"])["text_ids"])

    def gone(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(dataset, "SECONDS_BEFORE_TRIES", (0.0,))
    monkeypatch.setattr(os, "preadv", gone)
    with pytest.raises(ImpromptError, match="Input/output error.*goes on from the last checkpoint"):
        data.rows([3], ["text_ids"])


def test_workers_take_gpus_by_turns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert [device_of_worker(i, first).index for i in range(5)] == [0, 1, 2, 0, 1]
    assert [device_of_worker(i, second) for i in range(3)] == [second] * 3
    assert device_of_worker(1, torch.device("cpu")) == torch.device("cpu")


def test_rows_on_an_object_store(straight):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name, content in contents(straight).items():
        memory.pipe(f"/bucket/data/{name}", content)
    data, here = Columns.open("memory://bucket/data"), Columns.open(straight)
    order = np.random.default_rng(0).permutation(len(here))
    for name in COLUMNS:
        assert torch.equal(data.rows(order, [name])[name], here.rows(order, [name])[name])
    with pytest.raises(ImpromptError, match="no prepared data"):
        Columns.open("memory://bucket/other")
    with pytest.raises(ImpromptError, match="cannot be opened"):
        Columns.open("nonsense://bucket/other")


def write_synthetic(folder, num_rows, dim=64):
    folder.mkdir()
    counts = [min(4096, num_rows - start) for start in range(0, num_rows, 4096)]
    for number, count in enumerate(counts):
        part = folder / f"parts/{number:05d}"
        part.mkdir(parents=True)
        rows = torch.arange(count)[:, None] + number * 4096 + torch.arange(dim)
        column = GrowingColumn(part / "x.npy")
        column.append(rows.int())
        column.finish()
        column.close()
    write_array(folder / "parts.npy", np.array(counts))
    write_array(folder / "removed.npy", np.empty(0, np.int64))
    write_json(
        folder / "meta.json", {"count": num_rows, "num_parts": len(counts), "columns": ["x"]}
    )


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see memory")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    grown = {}
    for num_rows in (1000, 1_000_000):
        write_synthetic(tmp_path / str(num_rows), num_rows)
        before, began = resident_bytes(), time.monotonic()
        data = Columns.open(tmp_path / str(num_rows))
        assert time.monotonic() - began < 5
        random = np.random.default_rng(0)
        for _ in range(500):
            indices = random.integers(0, num_rows, 64)
            rows = data.rows(indices, ["x"])["x"]
            assert torch.equal(rows[:, 0], torch.from_numpy(indices).int())
        grown[num_rows] = resident_bytes() - before
    # Memory-mapped, 32,000 rows on as many pages would count as 125 MB.
    assert grown[1_000_000] < grown[1000] + 10_000_000


def test_a_ray_cluster_gives_what_one_process_gives(base, archives, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(sources.__file__).parents[2]))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        options = {"columns": COLUMNS, "batch_size": 8}
        prepare(archives, tmp_path / "one", base, **options)
        prepare(archives, tmp_path / "two", base, workers=2, engine="ray", **options)
    finally:
        ray.shutdown()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
