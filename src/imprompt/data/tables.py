"""Pairs in Parquet files, and in Hugging Face datasets on disk (Arrow files); read with pyarrow.

An image is a path, the bytes of its file, or a structure of `bytes` and `path`, as the library
`datasets` stores them. Rows are read a stretch at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from imprompt.core.errors import ImpromptError
from imprompt.data.pairs import Pair, Part, first_of, identity_of, shown
from imprompt.data.records import IMAGE_KEYS, Reading, check_keys, embedded_pair, record_pair

ROWS_AT_A_TIME = 256
_PATH = "image_file"  # under which a row without bytes is read as an entry of a list


def is_table(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def is_dataset(path: Path) -> bool:
    """Whether a folder is what `datasets.save_to_disk` wrote."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def table_parts(files: Sequence[Path], reading: Reading, pairs_per_part: int) -> list[Part]:
    """Parquet files, each cut into parts of so many rows.

    Raises:
        ImpromptError: pyarrow is missing, a file cannot be read, or there is no column of images.
    """
    parquet = _pyarrow("parquet")
    parts = []
    for file in files:
        try:
            with parquet.ParquetFile(file) as table:
                num_rows, names = table.metadata.num_rows, set(table.schema_arrow.names)
        except Exception as error:
            raise ImpromptError(f"{file} is no Parquet file that can be read: {error}") from error
        check_keys(str(file), names, reading)
        for start in range(0, num_rows, pairs_per_part):
            stop = min(start + pairs_per_part, num_rows)
            parts.append(
                Part(
                    f"{shown(file.name)} rows {start} to {stop - 1}",
                    stop - start,
                    identity_of(file.name, file.stat().st_size, start, stop),
                    lambda file=file, start=start, stop=stop: _Rows(
                        stop - start, _parquet_rows(file, start), file, reading, start
                    ),
                )
            )
    if not parts:
        raise ImpromptError(f"{files[0]} has no rows.")
    return parts


def dataset_parts(folder: Path, reading: Reading) -> list[Part]:
    """The Arrow files of a dataset on disk, a part each.

    Raises:
        ImpromptError: pyarrow is missing, it is a dictionary of datasets, or it is damaged.
    """
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        raise ImpromptError(f"{folder} holds several datasets; give one: {folder / names[0]}.")
    ipc, parts = _pyarrow("ipc"), []
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / str(entry["filename"]) for entry in state["_data_files"]]
        for file in files:
            with ipc.open_stream(file) as stream:
                names = set(stream.schema.names)
                num_rows = sum(batch.num_rows for batch in stream)
            check_keys(str(file), names, reading)
            parts.append(
                Part(
                    shown(file.name),
                    num_rows,
                    identity_of(file.name, file.stat().st_size),
                    lambda file=file, num_rows=num_rows: _Rows(
                        num_rows, _arrow_rows(file), file, reading, 0
                    ),
                )
            )
    except ImpromptError:
        raise
    except Exception as error:
        raise ImpromptError(f"{folder} is no dataset that can be read: {error}") from error
    if not parts:
        raise ImpromptError(f"{folder} has no rows.")
    return parts


def _pyarrow(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError as error:
        raise ImpromptError(
            "This source needs pyarrow: pip install 'imprompt[tables]', or give a .csv or .json list."
        ) from error


Fetch = Callable[[int, int], list[Mapping[str, Any]]]


class _Rows(Sequence):
    """The pairs of a stretch of rows, fetched when they are asked for."""

    def __init__(self, count: int, fetch: Fetch, file: Path, reading: Reading, first: int) -> None:
        self._count, self._fetch, self._file = count, fetch, file
        self._reading, self._first = reading, first
        self._root = (reading.image_root or file.parent).resolve()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key: int | slice) -> Any:
        if isinstance(key, int):
            return self[key : key + 1][0]
        start, stop, _ = key.indices(self._count)
        try:
            records = self._fetch(start, stop)
        except Exception as error:
            raise ImpromptError(
                f"{self._file} cannot be read at row {self._first + start}: "
                f"{str(error) or 'it ends before'}."
            ) from error
        return [self._pair(self._first + start + i, record) for i, record in enumerate(records)]

    def _pair(self, number: int, record: Mapping[str, Any]) -> Pair:
        name = f"{self._file.name} row {number}"
        key = self._reading.image_key
        image = record.get(key) if key else first_of(record, IMAGE_KEYS)
        reading = self._reading
        if isinstance(image, Mapping):
            if image.get("bytes") is None:
                record = {**record, _PATH: image.get("path")}
                return record_pair(name, record, self._root, replace(reading, image_key=_PATH))
            name = f"{name} {image['path']}" if isinstance(image.get("path"), str) else name
            image = image["bytes"]
        if isinstance(image, bytes):
            return embedded_pair(name, image, record, self._root, reading)
        return record_pair(name, record, self._root, reading)


def _parquet_rows(file: Path, first: int) -> Fetch:
    """Rows of a Parquet file by number, counted from `first`; mostly asked for one after another."""
    parquet = _pyarrow("parquet")

    def stretches(begin: int) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
        with parquet.ParquetFile(file) as table:
            row = 0
            for group in range(table.metadata.num_row_groups):
                count = table.metadata.row_group(group).num_rows
                if row + count > begin:
                    for batch in table.iter_batches(ROWS_AT_A_TIME, row_groups=[group]):
                        if row + batch.num_rows > begin:
                            yield row, batch
                        row += batch.num_rows
                else:
                    row += count

    return _in_order(stretches, first)


def _arrow_rows(file: Path) -> Fetch:
    ipc = _pyarrow("ipc")
    import pyarrow

    def stretches(begin: int) -> Iterator[tuple[int, Any]]:
        with pyarrow.memory_map(str(file)) as memory, ipc.open_stream(memory) as stream:
            row = 0
            for whole in stream:
                for start in range(0, whole.num_rows, ROWS_AT_A_TIME):
                    batch = whole.slice(start, ROWS_AT_A_TIME)
                    if row + batch.num_rows > begin:
                        yield row, batch
                    row += batch.num_rows

    return _in_order(stretches, 0)


def _in_order(stretches: Callable[[int], Iterator[tuple[int, Any]]], offset: int) -> Fetch:
    """Turn stretches of rows into rows by number. Going back begins again; going on costs nothing.

    Threads take turns: they share the place in the file.
    """
    at, running, rows, turn = 0, None, [], Lock()

    def fetch(start: int, stop: int) -> list[Mapping[str, Any]]:
        nonlocal at, running, rows
        start, stop = start + offset, stop + offset
        with turn:
            coming, running = running, None  # after a fault the next one begins again
            if coming is None or start < at:
                coming, at, rows = stretches(start), start, []
                first, batch = next(coming)
                rows = batch.slice(start - first).to_pylist()
            while at < start or len(rows) < stop - at:
                drop = min(start - at, len(rows))
                rows, at = rows[drop:], at + drop
                if len(rows) < stop - at:
                    rows += next(coming)[1].to_pylist()
            running = coming
            return rows[: stop - start]

    return fetch
