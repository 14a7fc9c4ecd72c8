"""How prepared data might be stored: plain .npy files, memory-mapped or read; Lance; Parquet.

    python benchmarks/store.py --rows 1000 100000 1000000 --out store.json

Every measurement of a store and a size runs in a process of its own, so that memory is its own. Rows are
2,048 bytes of noise in float16 (an image embedding) and 77 token ids. Each is written in pieces of 4,096
rows, as `imprompt prepare` does, and read in random batches of 32 from all rows; a second column of 256
bytes is added afterwards. Files lie in the system's cache: what is compared is the work of the stores,
not the disk. Stores whose library is not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

DIM, NUM_IDS, ADDED_DIM, PIECE, BATCH = 1024, 77, 128, 4096, 32


def pieces(num_rows: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    noise = np.random.default_rng(0).standard_normal((PIECE, DIM)).astype(np.float16)
    for start in range(0, num_rows, PIECE):
        count = min(PIECE, num_rows - start)
        rows = noise[:count].copy()
        rows[:, 0] = np.arange(count)
        ids = np.tile(np.arange(NUM_IDS, dtype=np.int64), (count, 1))
        ids[:, 0] = np.arange(start, start + count)
        yield start, rows, ids


def added(num_rows: int) -> Iterator[np.ndarray]:
    for start in range(0, num_rows, PIECE):
        yield np.ones((min(PIECE, num_rows - start), ADDED_DIM), np.float16)


class Mapped:
    """One .npy for each column and piece, memory-mapped."""

    def write(self, folder: Path, num_rows: int) -> None:
        for start, rows, ids in pieces(num_rows):
            np.save(folder / f"x{start // PIECE:05d}.npy", rows)
            np.save(folder / f"ids{start // PIECE:05d}.npy", ids)

    def add(self, folder: Path, num_rows: int) -> None:
        for number, rows in enumerate(added(num_rows)):
            np.save(folder / f"added{number:05d}.npy", rows)

    def open(self, folder: Path) -> Any:
        return [
            [np.load(file, mmap_mode="r") for file in sorted(folder.glob(f"{name}0*.npy"))]
            for name in ("x", "ids")
        ]

    def read(self, opened: Any, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tuple(  # type: ignore[return-value]
            np.stack([files[i // PIECE][i % PIECE] for i in indices.tolist()]) for files in opened
        )


class Read:
    """This project's store: the same files, rows read by position."""

    def write(self, folder: Path, num_rows: int) -> None:
        self._append(folder, num_rows, ("x", "ids"), ((x, i) for _, x, i in pieces(num_rows)))

    def add(self, folder: Path, num_rows: int) -> None:
        self._append(folder, num_rows, ("added",), ((rows,) for rows in added(num_rows)))
        from imprompt.core.files import write_json

        meta = json.loads((folder / "meta.json").read_text())
        write_json(folder / "meta.json", {**meta, "columns": ["added", "ids", "x"]})

    def _append(self, folder: Path, num_rows: int, names: Any, rows: Any) -> None:
        import torch

        from imprompt.core.files import write_json
        from imprompt.data.store import GrowingColumn, write_array

        counts = []
        for number, values in enumerate(rows):
            part = folder / f"parts/{number:05d}"
            part.mkdir(parents=True, exist_ok=True)
            counts.append(len(values[0]))
            for name, value in zip(names, values, strict=True):
                column = GrowingColumn(part / f"{name}.npy")
                column.append(torch.from_numpy(value))
                column.finish()
                column.close()
        write_array(folder / "parts.npy", np.array(counts, dtype=np.int64))
        write_array(folder / "removed.npy", np.empty(0, np.int64))
        if "x" in names:
            meta = {"count": num_rows, "num_parts": len(counts), "columns": sorted(names)}
            write_json(folder / "meta.json", meta)

    def open(self, folder: Path) -> Any:
        from imprompt.data.dataset import Columns

        return Columns.open(folder)

    def read(self, opened: Any, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = opened.rows(indices, ("x", "ids"))
        return rows["x"].numpy(), rows["ids"].numpy()


def _table(names: tuple[str, ...], values: tuple[np.ndarray, ...]) -> Any:
    import pyarrow

    return pyarrow.table(
        {
            name: pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(v.reshape(-1)), v.shape[1])
            for name, v in zip(names, values, strict=True)
        }
    )


def _numpy(column: Any, width: int) -> np.ndarray:
    import pyarrow

    whole = column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column
    return whole.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


class Lance:
    """A Lance dataset, appended to piece by piece."""

    def write(self, folder: Path, num_rows: int) -> None:
        import lance

        for start, rows, ids in pieces(num_rows):
            mode = "append" if start else "create"
            lance.write_dataset(_table(("x", "ids"), (rows, ids)), str(folder / "data"), mode=mode)

    def add(self, folder: Path, num_rows: int) -> None:
        import lance

        table = _table(("added",), (np.ones((1, ADDED_DIM), np.float16),))
        batches = (_table(("added",), (rows,)).to_batches()[0] for rows in added(num_rows))
        import pyarrow

        reader = pyarrow.RecordBatchReader.from_batches(table.schema, batches)
        lance.dataset(str(folder / "data")).add_columns(reader)

    def open(self, folder: Path) -> Any:
        import lance

        return lance.dataset(str(folder / "data"))

    def read(self, opened: Any, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        table = opened.take(indices.tolist(), columns=["x", "ids"])
        return _numpy(table["x"], DIM), _numpy(table["ids"], NUM_IDS)


class Parquet:
    """A Parquet file of each piece, uncompressed, a row group of 64 rows each."""

    GROUP = 64

    def write(self, folder: Path, num_rows: int) -> None:
        from pyarrow import parquet

        for start, rows, ids in pieces(num_rows):
            file = folder / f"{start // PIECE:05d}.parquet"
            self._save(parquet, _table(("x", "ids"), (rows, ids)), file)

    def _save(self, parquet: Any, table: Any, file: Path) -> None:
        parquet.write_table(
            table, file, row_group_size=self.GROUP, compression="none", use_dictionary=False
        )

    def add(self, folder: Path, num_rows: int) -> None:
        from pyarrow import parquet

        # A column cannot be put into a Parquet file: it is written anew, or stands in files beside.
        for number, rows in enumerate(added(num_rows)):
            self._save(parquet, _table(("added",), (rows,)), folder / f"added{number:05d}.pq")

    def open(self, folder: Path) -> Any:
        from pyarrow import parquet

        return [parquet.ParquetFile(file) for file in sorted(folder.glob("*.parquet"))]

    def read(self, opened: Any, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out = np.empty((len(indices), DIM), np.float16), np.empty((len(indices), NUM_IDS), np.int64)
        for place, index in enumerate(indices.tolist()):
            group, row = divmod(index % PIECE, self.GROUP)
            table = opened[index // PIECE].read_row_group(group, columns=["x", "ids"])
            out[0][place] = _numpy(table["x"], DIM)[row]
            out[1][place] = _numpy(table["ids"], NUM_IDS)[row]
        return out


STORES: dict[str, tuple[Any, str | None]] = {
    "npy, memory-mapped": (Mapped, None),
    "npy, read (chosen)": (Read, None),
    "Lance": (Lance, "lance"),
    "Parquet": (Parquet, "pyarrow"),
}


def resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise OSError("this system does not tell a process's memory")


def measure(
    store: Any, action: str, folder: Path, num_rows: int, seconds: float
) -> dict[str, float]:
    store.write(Path(tempfile.mkdtemp(dir=folder)), 2)  # libraries load on first use
    if action == "write":
        began = time.perf_counter()
        store.write(folder, num_rows)
        wrote = time.perf_counter()
        return {"append rows/s": num_rows / (wrote - began)}
    if action == "add":
        began = time.perf_counter()
        store.add(folder, num_rows)
        return {"add column s": time.perf_counter() - began}
    random = np.random.default_rng(1)
    store.read(store.open(folder), np.arange(2))
    before = resident_mb()
    began = time.perf_counter()
    opened = store.open(folder)
    open_seconds = time.perf_counter() - began
    num_read, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        indices = random.integers(0, num_rows, BATCH)
        rows, ids = store.read(opened, indices)
        assert (ids[:, 0] == indices).all() and rows.shape == (BATCH, DIM)
        num_read += BATCH
    rate = num_read / (time.perf_counter() - began)
    return {
        "open ms": 1000 * open_seconds,
        "random rows/s": rate,
        "memory MB": resident_mb() - before,
    }


def run_apart(
    name: str, action: str, folder: Path, num_rows: int, seconds: float
) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", name, action, str(folder), str(num_rows)]
    done = subprocess.run(
        [*command, "--seconds", str(seconds)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES))
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to read for each")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, action, folder, num_rows = arguments.one
        store = STORES[name][0]()
        print(json.dumps(measure(store, action, Path(folder), int(num_rows), arguments.seconds)))
        return
    results = []
    for num_rows in arguments.rows:
        for name in arguments.stores:
            module = STORES[name][1]
            if module and importlib.util.find_spec(module) is None:
                print(f"{name}: left out, {module} is not installed", file=sys.stderr)
                continue
            folder = Path(tempfile.mkdtemp(dir=arguments.scratch))
            try:
                figures: dict[str, Any] = {"store": name, "rows": num_rows}
                for action in ("write", "read", "add"):
                    figures |= run_apart(name, action, folder, num_rows, arguments.seconds)
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                figures["disk MB"] = size / 1e6
            finally:
                shutil.rmtree(folder)
            results.append(figures)
            shown = (
                f"{v:,.0f}"
                if isinstance(v, float) and v > 20
                else f"{v:.3g}"
                if isinstance(v, float)
                else str(v)
                for v in figures.values()
            )
            if len(results) == 1:
                print("| " + " | ".join(figures) + " |\n" + "|---" * len(figures) + "|")
            print("| " + " | ".join(shown) + " |", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
