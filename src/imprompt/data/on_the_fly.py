"""Pairs that are encoded when a step asks for them, behind the face of prepared data.

For data that are seen once, where storing features gains nothing. A source is read in place; only how many
pairs each of its parts has is kept in memory, and the listings of the parts that were used last. To list one may
take a second: its rows are to be asked for together, as `part_ends` tells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imprompt.bases import Base
from imprompt.core.errors import ImpromptError
from imprompt.core.files import disk_errors, write_whole
from imprompt.core.progress import progress
from imprompt.data.batch import Work, encode_rows, try_load
from imprompt.data.columns import encoder_of
from imprompt.data.encoding import fault_entry
from imprompt.data.faces import default_face_encoder
from imprompt.data.filters import Filters, Unusable
from imprompt.data.pairs import Loaded, Pair, identity_of
from imprompt.data.records import Reading
from imprompt.data.rows import PARTS_AT_ONCE, Fetched
from imprompt.data.sources import open_source
from imprompt.data.store import read_lines
from imprompt.encoders.face import loaded_face_encoder

# A run reads ahead: the parts that it reads next are open beside those that it reads now.
PARTS_KEPT_LISTED = 3 * PARTS_AT_ONCE
PAIRS_AT_ONCE = 64
MAX_UNUSABLE_IN_A_ROW = 1000


class PairsOnTheFly:
    """Rows of a source, encoded by the base each time.

    A pair that cannot be used is stood in for by the next one that can, which is the same one at every
    repetition; `unusable` tells of them. Duplicates are not looked for.
    """

    def __init__(
        self,
        source: str,
        base: Base,
        *,
        size_px: int | None = None,
        reading: Reading | None = None,
        filters: Filters | None = None,
        variant: str = "base",
        face_encoder: str | None = None,
        readers: int = 4,
    ) -> None:
        """List a source; arguments are those of `prepare`. `readers` threads decode images.

        Raises:
            ImpromptError: no such source, nothing in it, or a size that the base cannot do.
        """
        size_px = base.image_size_px if size_px is None else size_px
        base.latent_shape(size_px)
        filters = Filters() if filters is None else filters
        reading = Reading() if reading is None else reading
        self.path = source
        self.unusable: dict[int, dict[str, str]] = {}
        self._base = base
        self._work = Work(
            columns=(),
            added_columns=(),
            size_px=size_px,
            batch_size=PAIRS_AT_ONCE,
            filters=filters,
            face_encoder=face_encoder or default_face_encoder(source, variant),
        )
        self._pool = ThreadPoolExecutor(readers)
        parts = open_source(source, reading)
        counts = []
        with progress(len(parts), "listing", unit="part", silent=len(parts) < 10) as bar:
            for part in parts:
                counts.append(len(part.pairs()))
                bar.update(1)
        self.part_ends = np.cumsum(np.array(counts, dtype=np.int64))
        if not len(self):
            raise ImpromptError(f"{source} holds no pairs.")
        self._num_first = len(self)
        self._pairs = lru_cache(PARTS_KEPT_LISTED)(lambda number: parts[number].pairs())
        self.meta: Mapping[str, Any] = {
            "source": source,
            "listing": identity_of(*(part.identity for part in parts)),
            "count": len(self),
            "base": base.name,
            "encoders_fingerprint": base.encoders_fingerprint(),
            "size_px": size_px,
            "filters": filters.described(),
            "reading": reading.described(),
        }
        if len(parts) > PARTS_AT_ONCE:  # which decides in which order rows are seen
            self.meta = {**self.meta, "parts_at_once": PARTS_AT_ONCE}

    def __len__(self) -> int:
        return int(self.part_ends[-1])

    def require(self, names: Sequence[str]) -> None:
        """Raise an ImpromptError unless all these columns are known.

        Once identity vectors are asked for, `meta` says whose they are.
        """
        for name in names:
            encoder_of(name)
        if "id_embeds" in names:
            faces = loaded_face_encoder(self._work.face_encoder)
            self.meta = {**self.meta, "face_encoder": faces.fingerprint()}

    def hold_out(self, num_rows: int) -> None:
        """Let none of the last rows stand in for one before them, and none of those for one of the last."""
        self._num_first = max(0, len(self) - num_rows)

    def rows(
        self, indices: Sequence[int] | range | np.ndarray, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """The given rows of the given columns, in the given order."""
        indices = np.asarray(indices, dtype=np.int64)
        pieces = [
            self.fetch(indices[start : start + PAIRS_AT_ONCE], names)()
            for start in range(0, len(indices), PAIRS_AT_ONCE)
        ]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in names}

    def fetch(self, indices: np.ndarray, names: Sequence[str]) -> Fetched:
        """Read and decode these rows' images; what is returned encodes them."""
        work = replace(self._work, columns=tuple(names))
        loaded = list(self._pool.map(lambda row: self._usable_from(row, work), indices.tolist()))

        def encode() -> dict[str, Tensor]:
            # Not in inference mode: what is encoded is trained on.
            with torch.no_grad():
                return encode_rows(loaded, names, self._base, work)

        return encode

    def _usable_from(self, index: int, work: Work) -> tuple[Pair, Loaded]:
        begin, end = (
            (0, self._num_first) if index < self._num_first else (self._num_first, len(self))
        )
        for number in range(index - begin, index - begin + MAX_UNUSABLE_IN_A_ROW):
            row = begin + number % (end - begin)
            try:
                pair = self._pair(row)
            except Exception as error:  # of a file that is damaged here, or gone
                fault = Unusable("source damaged", str(error))
                self.unusable[row] = fault_entry(f"row {row}", fault)
                continue
            loaded = try_load(pair, work)
            if isinstance(loaded, Unusable):
                self.unusable[row] = fault_entry(pair.name, loaded)
            else:
                return pair, loaded
        raise ImpromptError(
            f"{MAX_UNUSABLE_IN_A_ROW} pairs of {self.path} in a row cannot be used, from row {index} on; "
            f"the last: {self.unusable[row]['pair']}: {self.unusable[row]['reason']}"
        )

    def _pair(self, row: int) -> Pair:
        part = int(np.searchsorted(self.part_ends, row, side="right"))
        begin = int(self.part_ends[part - 1]) if part else 0
        return self._pairs(part)[row - begin]

    def write_unusable(self, path: Path) -> None:
        """List the pairs that could not be used so far, if any, with their reasons.

        What the file has of a run that was stopped stays in it.
        """
        if not self.unusable:
            return
        with disk_errors(path):
            entries = read_lines(path) if path.exists() else []
            known = {entry["pair"] for entry in entries}
            new = [self.unusable[row] for row in sorted(self.unusable)]
            entries += [entry for entry in new if entry["pair"] not in known]
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        write_whole(path, lambda file: file.write(lines.encode()))
