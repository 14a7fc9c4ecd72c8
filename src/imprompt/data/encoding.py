"""One part of a source to rows of columns. A part is one process's at a time, and starts again anywhere.

What has been decided and written so far is told by `progress.json`; whatever lies beyond it in the other
files is from a run that was stopped, and is dropped and done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imprompt.bases import Base
from imprompt.core.errors import ImpromptError
from imprompt.core.files import check_room, write_json
from imprompt.data.batch import Accepted, Work, encode_rows, load_ahead
from imprompt.data.columns import CONTROL, KEPT_MISSING
from imprompt.data.faces import FACE_MISSING
from imprompt.data.filters import Unusable
from imprompt.data.pairs import Loaded, Pair, Part
from imprompt.data.store import GrowingColumn, GrowingLines, read_lines
from imprompt.diorama import Scene

SAVE_EVERY_SECONDS = 5.0
FOUND_BY_COLUMNS = (FACE_MISSING, KEPT_MISSING)

Report = Callable[[int, int], None]
"""Called with how many more pairs are done, and how many more there are than was thought."""


@dataclass
class PartProgress:
    """How far a part is."""

    name: str
    identity: str
    next_pair: int = 0
    num_rows: int = 0
    num_rejected: int = 0
    pairs_bytes: int = 0
    rejected_bytes: int = 0
    columns: list[str] = field(default_factory=list)
    """Those that are whole."""
    done: bool = False

    @classmethod
    def read(cls, folder: Path, part: Part) -> PartProgress:
        """A part's progress, which is none at first.

        Raises:
            ImpromptError: what was begun was another part.
        """
        try:
            progress = cls(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls(part.name, part.identity)
        except (ValueError, TypeError) as error:
            raise ImpromptError(f"{folder} is damaged: {error}. Prepare the data again.") from error
        if (progress.name, progress.identity) != (part.name, part.identity):
            raise ImpromptError(
                f"The source has changed since {folder.parent.parent} was begun: {part.name!r} was "
                f"{progress.name!r} or held other pairs. Prepare it into a new folder; or new pairs alone, "
                "from a folder of their own: several prepared folders are trained on as one."
            )
        return progress

    def write(self, folder: Path) -> None:
        write_json(folder / "progress.json", asdict(self))


def missing_columns(progress: PartProgress, work: Work) -> list[str]:
    """What a part still lacks; empty when nothing is left to do."""
    return [name for name in (*work.columns, *work.added_columns) if name not in progress.columns]


def encode_part(
    part: Part, folder: Path, base: Base, work: Work, pool: Executor, report: Report
) -> None:
    """Do what is left of a part. The caller holds its lock.

    Raises:
        ImpromptError: the disk is full, or the source has changed.
    """
    progress = PartProgress.read(folder, part)
    pairs = part.pairs()
    adds = any(name not in progress.columns for name in work.added_columns)
    # Columns are added in a pass of their own, in which all pairs are opened once more.
    num_passes = int(not progress.done) + int(adds)
    report(0, num_passes * len(pairs) - part.num_pairs)
    with torch.inference_mode():
        if not progress.done:
            _write_rows(pairs, folder, base, work, pool, report, progress)
        if missing := missing_columns(progress, work):
            _add_columns(pairs, folder, base, work, pool, report, progress, missing)
            progress.columns = sorted([*progress.columns, *missing])
            progress.write(folder)
            (folder / "adding.json").unlink(missing_ok=True)


def _write_rows(
    pairs: Sequence[Pair],
    folder: Path,
    base: Base,
    work: Work,
    pool: Executor,
    report: Report,
    progress: PartProgress,
) -> None:
    rows = GrowingLines(folder / "pairs.jsonl", progress.pairs_bytes)
    rejected = GrowingLines(folder / "rejected.jsonl", progress.rejected_bytes)
    columns = {name: _column(folder, name, progress.num_rows) for name in work.columns}
    looks_for_duplicates = work.filters.duplicates != "keep"
    seen: dict[int, str] = (
        {row["content"]: row["pair"] for row in rows.read()} if looks_for_duplicates else {}
    )

    def listed(start: int, batch: Sequence[tuple[Pair, Loaded | Unusable]]) -> list[Accepted]:
        """The pairs that get a row; every pair is written into the list it belongs to."""
        accepted = []
        for index, (pair, loaded) in enumerate(batch, start):
            if isinstance(loaded, Loaded) and loaded.content in seen:
                loaded = duplicate_of(seen[loaded.content])
            if isinstance(loaded, Unusable):
                progress.num_rejected += 1
                rejected.add(fault_entry(pair.name, loaded))
                continue
            if looks_for_duplicates:
                seen[loaded.content] = pair.name
            accepted.append((pair, loaded))
            known = {"caption": loaded.caption, "content": loaded.content}
            rows.add({"index": index, "pair": pair.name, **known})
        return accepted

    def save() -> None:
        for file in (*columns.values(), rows, rejected):
            file.save()
        progress.pairs_bytes, progress.rejected_bytes = rows.num_bytes, rejected.num_bytes
        progress.write(folder)

    try:
        report(progress.next_pair, 0)
        save_sometimes = _Sometimes(save)
        starts = range(progress.next_pair, len(pairs), work.batch_size)
        for start, batch in load_ahead(pairs, starts, work, pool):
            accepted = listed(start, batch)
            if accepted:
                encoded = encode_rows(accepted, work.columns, base, work)
                _append(encoded, columns, folder, len(pairs) - start)
            progress.num_rows += len(accepted)
            progress.next_pair = start + len(batch)
            report(len(batch), 0)
            save_sometimes()
        for column in columns.values():
            column.finish()
        progress.done, progress.columns = True, sorted(work.columns)
        save()
    finally:
        for file in (*columns.values(), rows, rejected):
            file.close()


def _add_columns(
    pairs: Sequence[Pair],
    folder: Path,
    base: Base,
    work: Work,
    pool: Executor,
    report: Report,
    progress: PartProgress,
    names: Sequence[str],
) -> None:
    """Columns for the rows a part has, from the same batches, so that they are what they would have
    been if they had been asked for at the beginning."""
    kept = _kept_pixels(pairs, folder, progress, names)
    state_file = folder / "adding.json"
    state = {"columns": list(names), "next_pair": 0, "num_rows": 0}
    if state_file.exists():
        found = json.loads(state_file.read_text(encoding="utf-8"))
        state = found if found["columns"] == state["columns"] else state
    rows = {row["index"]: row for row in read_lines(folder / "pairs.jsonl")}
    columns = {name: _column(folder, name, state["num_rows"]) for name in names}

    def save() -> None:
        for column in columns.values():
            column.save()
        write_json(state_file, state)

    try:
        report(min(state["next_pair"], len(pairs)), 0)
        save_sometimes = _Sometimes(save)
        starts = range(state["next_pair"], len(pairs), work.batch_size)
        for start, batch in load_ahead(pairs, starts, work, pool, rows):
            numbers = range(len(pairs))[start : start + work.batch_size]
            accepted = _checked(batch, [rows[i] for i in numbers if i in rows])
            if accepted:
                first = state["num_rows"]
                pixels = None if kept is None else np.array(kept[first : first + len(accepted)])
                encoded = encode_rows(accepted, names, base, work, pixels)
                _append(encoded, columns, folder, len(rows))
            state["num_rows"] += len(accepted)
            state["next_pair"] = numbers.stop
            report(len(numbers), 0)
            save_sometimes()
        for column in columns.values():
            column.finish()
    finally:
        for column in columns.values():
            column.close()


def _kept_pixels(
    pairs: Sequence[Pair], folder: Path, progress: PartProgress, names: Sequence[str]
) -> np.ndarray | None:
    """The column `pixels`, if all that is missing can be made of it: scenes whose pixels are kept
    are not drawn again, which is most of the work."""
    is_kept = "pixels" in progress.columns and all(isinstance(p.image, Scene) for p in pairs)
    needs_scenes = any(name.startswith(CONTROL) for name in names)
    return np.load(folder / "pixels.npy", mmap_mode="r") if is_kept and not needs_scenes else None


def _checked(
    batch: Sequence[tuple[Pair, Loaded | Unusable]], rows: Sequence[Mapping[str, Any]]
) -> list[Accepted]:
    """The pairs of these rows, if each can be used and is what it was when its row was written.

    Raises:
        ImpromptError: one is not.
    """
    accepted = []
    for (pair, loaded), row in zip(batch, rows, strict=True):
        if isinstance(loaded, Unusable) and loaded.kind in FOUND_BY_COLUMNS:
            raise ImpromptError(
                f"{pair.name} has a row already, but {loaded}. Prepare the data into a new folder, "
                "with these columns from the beginning: such pairs are left out then."
            )
        if isinstance(loaded, Unusable) or loaded.content != row["content"]:
            why = f": {loaded}" if isinstance(loaded, Unusable) else ""
            raise ImpromptError(
                f"{pair.name} is not what it was when its row was written{why}. Bring it back, "
                "or prepare the data into a new folder."
            )
        accepted.append((pair, loaded))
    return accepted


class _Sometimes:
    """Does something when so many seconds have gone by since it was done last."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do, self._done = do, time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._done >= SAVE_EVERY_SECONDS:
            self._do()
            self._done = time.monotonic()


def _column(folder: Path, name: str, num_rows: int) -> GrowingColumn:
    file = folder / f"{name}.npy"
    if num_rows == 0:
        file.unlink(missing_ok=True)
    return GrowingColumn(file, num_rows)


def _append(
    encoded: Mapping[str, torch.Tensor],
    columns: Mapping[str, GrowingColumn],
    folder: Path,
    num_pairs: int,
) -> None:
    """Add rows to their columns; before the first, see that there is room for those of all pairs."""
    if all(column.num_rows == 0 for column in columns.values()):
        row_bytes = sum(values[0].numel() * values.element_size() for values in encoded.values())
        check_room(folder, row_bytes * num_pairs)
    for name, values in encoded.items():
        columns[name].append(values)


def duplicate_of(name: str) -> Unusable:
    return Unusable("duplicate", f"it is a duplicate of {name}")


def fault_entry(name: str, fault: Unusable) -> dict[str, str]:
    """A line of the quarantine file."""
    return {"pair": name, "kind": fault.kind, "reason": str(fault)}
