"""Pairs to cached columns: the frozen encoders run once, whatever is trained on them afterwards.

What cannot be used is listed with its reason in OUT/quarantine.jsonl and stops nothing. Killed at any
moment and started again, it goes on, and the result is the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from imprompt.bases import Base
from imprompt.core.errors import ImpromptError
from imprompt.core.progress import progress
from imprompt.data.columns import COLUMNS, Batch, default_columns
from imprompt.data.dataset import ColumnsWriter, write_json
from imprompt.data.pairs import Pair, load, open_pairs, to_pixels

FLUSH_EVERY_BATCHES = 8


def prepare(
    source: str,
    output: Path,
    base: Base,
    *,
    columns: Sequence[str] | None = None,
    variant: str = "base",
    size_px: int | None = None,
    batch_size: int = 64,
) -> Path:
    """Encode all pairs of a source into the folder `output`; the same call resumes.

    `columns` are by default what an image-prompt adapter of `variant` is trained on.

    Raises:
        ImpromptError: nothing to prepare, an output folder that holds something else, a full disk.
    """
    size_px = base.image_size_px if size_px is None else size_px
    base.latent_shape(size_px)  # says clearly if the base cannot do this size
    columns = default_columns(variant) if columns is None else tuple(columns)
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise ImpromptError(f"There is no column {unknown[0]!r}; known are {', '.join(COLUMNS)}.")
    meta = {
        "source": source,
        "base": base.name,
        "base_fingerprint": base.fingerprint(),
        "size_px": size_px,
        "prepared_columns": list(columns),
    }
    pairs = open_pairs(source)
    if _claim(output, meta):
        return output
    state = _State(output)
    writer = ColumnsWriter(output, len(pairs))
    with progress(len(pairs), "preparing", unit="pair") as bar, torch.inference_mode():
        bar.update(state.next_pair)
        for number, start in enumerate(range(state.next_pair, len(pairs), batch_size)):
            part = pairs[start : start + batch_size]
            batch = _load_batch(part, size_px, state)
            if batch is not None:
                encoded = {name: COLUMNS[name](base, batch) for name in columns}
                writer.write(state.num_rows, encoded)
                state.num_rows += len(batch.captions)
                state.new_captions += batch.captions
            state.next_pair = start + len(part)
            bar.update(len(part))
            if number % FLUSH_EVERY_BATCHES == FLUSH_EVERY_BATCHES - 1:
                writer.flush()
                state.save()
    writer.flush()
    state.save()
    if state.num_rejected:
        print(
            f"imprompt: {state.num_rejected} of {len(pairs)} pairs could not be used; "
            f"{output / 'quarantine.jsonl'} says why",
            file=sys.stderr,
        )
    if state.num_rows == 0:
        raise ImpromptError(
            f"None of the {len(pairs)} pairs of {source} can be used; the first: {state.first_reason()}"
        )
    writer.finish(state.num_rows, meta)
    return output


def _claim(output: Path, meta: dict[str, Any]) -> bool:
    """Whether the folder holds these data already; else it is made ready for them.

    Raises:
        ImpromptError: it holds something else.
    """
    begun = output / "begun.json"
    if begun.exists():
        found = json.loads(begun.read_text(encoding="utf-8"))
        differing = [
            f"{name} {found.get(name)!r}, now {meta[name]!r}"
            for name in meta
            if found.get(name) != meta[name]
        ]
        if differing:
            raise ImpromptError(
                f"{output} holds other prepared data ({'; '.join(differing)}). Choose another folder."
            )
        return (output / "meta.json").exists()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ImpromptError(
            f"{output} is not empty and holds no prepared data. Choose another folder."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(begun, meta)
    except OSError as error:
        raise ImpromptError(f"Cannot write to {output}: {error.strerror}.") from error
    return False


class _State:
    """How far the work is: pairs looked at, rows written, and the two growing lists."""

    def __init__(self, output: Path) -> None:
        self._file = output / "progress.json"
        self._captions = output / "captions.jsonl"
        self._quarantine = output / "quarantine.jsonl"
        self.next_pair = self.num_rows = self.num_rejected = 0
        if self._file.exists():
            saved = json.loads(self._file.read_text(encoding="utf-8"))
            self.next_pair, self.num_rows, self.num_rejected = (
                saved["next_pair"],
                saved["num_rows"],
                saved["num_rejected"],
            )
        # Lines past the last save belong to pairs that will be looked at again.
        _keep_lines(self._captions, self.num_rows)
        _keep_lines(self._quarantine, self.num_rejected)
        self.new_captions: list[str] = []
        self._new_rejects: list[dict[str, str]] = []

    def reject(self, name: str, reason: str) -> None:
        self.num_rejected += 1
        self._new_rejects.append({"pair": name, "reason": reason})

    def save(self) -> None:
        for path, lines in (
            (self._captions, self.new_captions),
            (self._quarantine, self._new_rejects),
        ):
            if lines or path is self._captions:
                with open(path, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.new_captions, self._new_rejects = [], []
        counts = {
            "next_pair": self.next_pair,
            "num_rows": self.num_rows,
            "num_rejected": self.num_rejected,
        }
        write_json(self._file, counts)

    def first_reason(self) -> str:
        with open(self._quarantine, encoding="utf-8") as file:
            first = json.loads(file.readline())
        return f"{first['pair']}: {first['reason']}"


def _keep_lines(path: Path, count: int) -> None:
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:count]), encoding="utf-8")


def _load_batch(pairs: Sequence[Pair], size_px: int, state: _State) -> Batch | None:
    pictures, captions, used = [], [], []
    for pair in pairs:
        try:
            picture, caption = load(pair, size_px)
        except ImpromptError as error:
            state.reject(pair.name, str(error))
            continue
        pictures.append(picture)
        captions.append(caption)
        used.append(pair)
    return Batch(used, to_pixels(pictures, size_px), captions) if pictures else None
