"""One part of a source to rows of columns. A part is one process's at a time, and starts again anywhere.

What has been decided and written so far is told by `progress.json`; whatever lies beyond it in the other
files is from a run that was stopped, and is dropped and done again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from imprompt.bases import Base
from imprompt.core.errors import ImpromptError
from imprompt.data.columns import CONDITION_COLUMNS, CONTROL, Batch, encoder_of, to_bytes
from imprompt.data.faces import FACE_MISSING, check_faces
from imprompt.data.filters import Filters, Unusable
from imprompt.data.pairs import Loaded, Pair, Part, draw, load
from imprompt.data.store import GrowingColumn, check_room, disk_errors, write_json
from imprompt.diorama import Scene

SAVE_EVERY_SECONDS = 5.0

Report = Callable[[int, int], None]
"""Called with how many more pairs are done, and how many more there are than was thought."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done with every part."""

    columns: tuple[str, ...]
    """The columns that rows are first written with."""
    added_columns: tuple[str, ...]
    """Columns added to rows that are there."""
    size_px: int
    batch_size: int
    filters: Filters
    face_encoder: str = "diorama"

    @property
    def with_condition(self) -> bool:
        """Whether pairs without a condition image are of no use."""
        return not CONDITION_COLUMNS.isdisjoint((*self.columns, *self.added_columns))


@dataclass
class Progress:
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
    def read(cls, folder: Path, part: Part) -> Progress:
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
                f"{progress.name!r} or held other pairs. Prepare it into a new folder."
            )
        return progress

    def write(self, folder: Path) -> None:
        write_json(folder / "progress.json", asdict(self))


def missing_columns(progress: Progress, work: Work) -> list[str]:
    """What a part still lacks; empty when nothing is left to do."""
    return [name for name in (*work.columns, *work.added_columns) if name not in progress.columns]


def encode_part(
    part: Part, folder: Path, base: Base, work: Work, pool: Executor, report: Report
) -> None:
    """Do what is left of a part. The caller holds its lock.

    Raises:
        ImpromptError: the disk is full, or the source has changed.
    """
    progress = Progress.read(folder, part)
    pairs = part.pairs()
    report(0, len(pairs) - part.num_pairs)
    with torch.inference_mode():
        if not progress.done:
            _write_rows(part, pairs, folder, base, work, pool, report, progress)
        else:
            report(len(pairs), 0)
        if missing := missing_columns(progress, work):
            _add_columns(pairs, folder, base, work, pool, progress, missing)
            progress.columns = sorted([*progress.columns, *missing])
            progress.write(folder)
            (folder / "adding.json").unlink(missing_ok=True)


def _write_rows(
    part: Part,
    pairs: Sequence[Pair],
    folder: Path,
    base: Base,
    work: Work,
    pool: Executor,
    report: Report,
    progress: Progress,
) -> None:
    rows = _Lines(folder / "pairs.jsonl", progress.pairs_bytes)
    rejected = _Lines(folder / "rejected.jsonl", progress.rejected_bytes)
    columns = {name: _column(folder, name, progress.num_rows) for name in work.columns}
    seen: dict[int, str] = {row["content"]: row["pair"] for row in rows.read()}

    def save() -> None:
        for file in (*columns.values(), rows, rejected):
            file.save()
        progress.pairs_bytes, progress.rejected_bytes = rows.num_bytes, rejected.num_bytes
        progress.write(folder)

    try:
        report(progress.next_pair, 0)
        starts = range(progress.next_pair, len(pairs), work.batch_size)
        loading = _load_ahead(
            lambda start: pairs[start : start + work.batch_size], starts, work, pool
        )
        saved = time.monotonic()
        for start, batch in zip(starts, loading, strict=True):
            accepted: list[tuple[Pair, Loaded]] = []
            for index, (pair, loaded) in enumerate(batch, start):
                if isinstance(loaded, Loaded) and loaded.content in seen:
                    loaded = duplicate_of(seen[loaded.content])
                if isinstance(loaded, Unusable):
                    progress.num_rejected += 1
                    rejected.add(fault_entry(pair.name, loaded))
                    continue
                if work.filters.duplicates != "keep":
                    seen[loaded.content] = pair.name
                accepted.append((pair, loaded))
                rows.add(
                    {
                        "index": index,
                        "pair": pair.name,
                        "caption": loaded.caption,
                        "content": loaded.content,
                    }
                )
            if accepted:
                encoded = encode_rows(accepted, work.columns, base, work)
                if progress.num_rows == 0:
                    _check_room(folder, encoded, len(pairs) - start)
                for name, values in encoded.items():
                    columns[name].append(values)
            progress.num_rows += len(accepted)
            progress.next_pair = start + len(batch)
            report(len(batch), 0)
            if time.monotonic() - saved >= SAVE_EVERY_SECONDS:
                save()
                saved = time.monotonic()
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
    progress: Progress,
    names: Sequence[str],
) -> None:
    """Columns for the rows a part has, from the same batches, so that they are what they would have
    been if they had been asked for at the beginning.

    Scenes whose pixels are kept are not drawn again, which is most of the work.
    """
    kept = None
    needs_scenes = any(name.startswith(CONTROL) for name in names)
    is_drawn = all(isinstance(pair.image, Scene) for pair in pairs)
    if "pixels" in progress.columns and is_drawn and not needs_scenes:
        kept = np.load(folder / "pixels.npy", mmap_mode="r")
    state_file = folder / "adding.json"
    state = {"columns": list(names), "next_pair": 0, "num_rows": 0}
    if state_file.exists():
        found = json.loads(state_file.read_text(encoding="utf-8"))
        state = found if found["columns"] == state["columns"] else state
    rows = {row["index"]: row for row in read_lines(folder / "pairs.jsonl")}
    columns = {name: _column(folder, name, state["num_rows"]) for name in names}

    def pairs_with_rows(start: int) -> list[Pair]:
        some = pairs[start : start + work.batch_size]
        return [pair for index, pair in enumerate(some, start) if index in rows]

    try:
        starts = range(state["next_pair"], len(pairs), work.batch_size)
        loading = _load_ahead(pairs_with_rows, starts, work, pool)
        saved = time.monotonic()
        for start, batch in zip(starts, loading, strict=True):
            accepted = []
            expected = [rows[i] for i in range(start, start + work.batch_size) if i in rows]
            for (pair, loaded), row in zip(batch, expected, strict=True):
                if isinstance(loaded, Unusable) and loaded.kind == FACE_MISSING:
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
            if accepted:
                first = state["num_rows"]
                pixels = None
                if kept is not None:
                    pixels = torch.from_numpy(np.array(kept[first : first + len(accepted)]))
                encoded = encode_rows(accepted, names, base, work, pixels)
                if state["num_rows"] == 0:
                    _check_room(folder, encoded, len(rows))
                for name, values in encoded.items():
                    columns[name].append(values)
            state["num_rows"] += len(accepted)
            state["next_pair"] = start + work.batch_size
            if time.monotonic() - saved >= SAVE_EVERY_SECONDS:
                for column in columns.values():
                    column.save()
                write_json(state_file, state)
                saved = time.monotonic()
        for column in columns.values():
            column.finish()
    finally:
        for column in columns.values():
            column.close()


def _column(folder: Path, name: str, num_rows: int) -> GrowingColumn:
    file = folder / f"{name}.npy"
    if num_rows == 0:
        file.unlink(missing_ok=True)
    return GrowingColumn(file, num_rows)


def _check_room(folder: Path, encoded: Mapping[str, torch.Tensor], num_pairs: int) -> None:
    row_bytes = sum(values[0].numel() * values.element_size() for values in encoded.values())
    check_room(folder, row_bytes * num_pairs)


def duplicate_of(name: str) -> Unusable:
    return Unusable("duplicate", f"it is a duplicate of {name}")


def fault_entry(name: str, fault: Unusable) -> dict[str, str]:
    """A line of the quarantine file."""
    return {"pair": name, "kind": fault.kind, "reason": str(fault)}


def _load_ahead(
    pairs_from: Callable[[int], Sequence[Pair]], starts: range, work: Work, pool: Executor
) -> Iterator[list[tuple[Pair, Loaded | Unusable]]]:
    """Batches of pairs, opened in the pool's threads while the batch before is encoded."""

    def begin(start: int) -> list[tuple[Pair, Future]]:
        return [(pair, pool.submit(try_load, pair, work)) for pair in pairs_from(start)]

    coming = begin(starts[0]) if starts else []
    for number in range(len(starts)):
        batch, coming = coming, []
        if number + 1 < len(starts):
            coming = begin(starts[number + 1])
        yield [(pair, future.result()) for pair, future in batch]


def try_load(pair: Pair, work: Work) -> Loaded | Unusable:
    """A pair's picture and caption, or why it cannot be used."""
    try:
        loaded = load(pair, work.size_px, work.filters, with_condition=work.with_condition)
        check_faces(loaded, (*work.columns, *work.added_columns), work.face_encoder)
        return loaded
    except Unusable as fault:
        return fault


def encode_rows(
    accepted: Sequence[tuple[Pair, Loaded]],
    columns: Sequence[str],
    base: Base,
    work: Work,
    kept: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The columns of pairs that have been read.

    `kept` are the pictures as the column `pixels` has them, from which all else is then made.
    """
    loaded = [one for _, one in accepted]
    pictures = [one.picture for one in loaded]
    conditions = [one.condition for one in loaded if one.condition is not None]
    others = [one.condition_picture for one in loaded if one.condition is not None]
    render, other_pixels = None, torch.empty(0, 3, work.size_px, work.size_px)
    if kept is None:
        # Drawn together: what a pair's two scenes have in common is traced once.
        pixels, render = draw([*pictures, *others], work.size_px)
        pixels, other_pixels = pixels[: len(pictures)], pixels[len(pictures) :]
        kept = to_bytes(pixels) if "pixels" in columns else None
    elif others:
        other_pixels, _ = draw(others, work.size_px)
    if kept is not None:
        pixels = kept.float() / 127.5 - 1
    batch = Batch(
        [pair for pair, _ in accepted],
        pixels,
        [one.caption for one in loaded],
        [one.reference for one in loaded],
        work.face_encoder,
        None if others else render,
        [one.maps for one in loaded],
        conditions,
        other_pixels,
        [one.framing for one in loaded],
    )
    return {name: encoder_of(name)(base, batch) for name in columns}


class _Lines:
    """A file of JSON lines that grows after its first `num_bytes`."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        with disk_errors(path):
            self._file: BinaryIO = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
            self._file.truncate(num_bytes)
            self._file.seek(num_bytes)
        self.num_bytes = num_bytes

    def read(self) -> list[dict[str, Any]]:
        return read_lines(self.path)

    def add(self, entry: Mapping[str, Any]) -> None:
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        with disk_errors(self.path):
            self._file.write(line)
        self.num_bytes += len(line)

    def save(self) -> None:
        with disk_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of JSON lines."""
    # Not splitlines: JSON may hold characters that Unicode calls line ends.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
