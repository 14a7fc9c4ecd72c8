"""From parts that are done to one whole: how many rows count, what repeats, what could not be used."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imprompt.core.files import write_json, write_whole
from imprompt.data.encoding import PartProgress, duplicate_of, fault_entry
from imprompt.data.pairs import Part
from imprompt.data.store import part_name, read_lines, write_array


@dataclass(frozen=True)
class Finished:
    num_rows: int
    num_pairs: int
    faults: Counter[str]


def finish(output: Path, parts: Sequence[Part], meta: Mapping[str, Any]) -> Finished | None:
    """Write what describes all parts together, if all are done. It is a function of the parts alone.

    The first of several pairs with one content stays, in whatever order they were encoded: the others'
    rows are left where they are and do not count.
    """
    folders = [output / part_name(number) for number in range(len(parts))]
    progress = [
        PartProgress.read(folder, part) for folder, part in zip(folders, parts, strict=True)
    ]
    if not all(one.done for one in progress):
        return None
    counts = np.array([one.num_rows for one in progress], dtype=np.int64)
    contents = np.empty(int(counts.sum()), dtype=np.int64)
    fingerprint = hashlib.blake2b(digest_size=8)
    for i, (_, row) in enumerate(_rows(folders)):
        contents[i] = row["content"]
    removed, firsts = np.empty(0, np.int64), {}
    if meta["filters"]["duplicates"] != "keep":
        removed, firsts = _repetitions(contents)
    removed_set = set(removed.tolist())
    names, repeated = {}, []
    for i, (name, row) in enumerate(_rows(folders)):
        if i in removed_set:
            repeated.append(fault_entry(name, duplicate_of(names[firsts[i]])))
            continue
        fingerprint.update(f"{row['content']} {row['caption']}\n".encode())
        if i in firsts:  # others repeat it
            names[i] = name
    faults = _write_quarantine(output / "quarantine.jsonl", folders, repeated)
    num_rows = len(contents) - len(removed)
    write_array(output / "parts.npy", counts)
    write_array(output / "removed.npy", removed)
    if num_rows:
        columns = set.intersection(*(set(one.columns) for one in progress))
        write_json(
            output / "meta.json",
            {
                **meta,
                "count": num_rows,
                "content_fingerprint": fingerprint.hexdigest(),
                "num_parts": len(parts),
                "columns": sorted(columns),
            },
        )
    return Finished(num_rows, sum(one.next_pair for one in progress), faults)


def _rows(folders: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for folder in folders:
        for row in read_lines(folder / "pairs.jsonl"):
            yield row["pair"], row


def _repetitions(contents: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
    """Rows whose content an earlier row has, and for each of them, and of itself, the first such."""
    _, first, group = np.unique(contents, return_index=True, return_inverse=True)
    original = first[group.reshape(-1)]
    removed = np.flatnonzero(original != np.arange(len(contents)))
    firsts = {int(row): int(original[row]) for row in removed}
    return removed, firsts | {row: row for row in firsts.values()}


def _write_quarantine(
    path: Path, folders: Sequence[Path], repeated: Sequence[Mapping[str, str]]
) -> Counter[str]:
    faults: Counter[str] = Counter()

    def write(file: Any) -> None:
        for folder in folders:
            for entry in read_lines(folder / "rejected.jsonl"):
                add(file, entry)
        for entry in repeated:
            add(file, entry)

    def add(file: Any, entry: Mapping[str, str]) -> None:
        faults[entry["kind"]] += 1
        file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())

    write_whole(path, write)
    return faults
