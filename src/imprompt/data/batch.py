"""A batch of pairs: opened in threads, and encoded to rows of columns."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
import torch

from imprompt.bases import Base
from imprompt.core.images import bytes_of_pixels, pixels_of_bytes
from imprompt.data.columns import CONDITION_COLUMNS, Batch, check_kept, encoder_of
from imprompt.data.faces import check_faces
from imprompt.data.filters import Filters, Unusable
from imprompt.data.pairs import Loaded, Pair, draw, load
from imprompt.diorama import Render

Accepted = tuple[Pair, Loaded]
"""A pair that gets a row."""


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


def load_ahead(
    pairs: Sequence[Pair],
    starts: range,
    work: Work,
    pool: Executor,
    wanted: Container[int] | None = None,
) -> Iterator[tuple[int, list[tuple[Pair, Loaded | Unusable]]]]:
    """From each start a batch of pairs, opened in the pool's threads while the one before is encoded.

    Of pairs that are not `wanted`, by their numbers, none is opened.
    """

    def begin(start: int) -> list[tuple[Pair, Future]]:
        some = enumerate(pairs[start : start + work.batch_size], start)
        return [
            (pair, pool.submit(try_load, pair, work))
            for number, pair in some
            if wanted is None or number in wanted
        ]

    coming = begin(starts[0]) if starts else []
    for start in starts:
        batch, coming = coming, []
        if start != starts[-1]:
            coming = begin(start + starts.step)
        yield start, [(pair, future.result()) for pair, future in batch]


def try_load(pair: Pair, work: Work) -> Loaded | Unusable:
    """A pair's picture and caption, or why it cannot be used."""
    try:
        loaded = load(pair, work.size_px, work.filters, with_condition=work.with_condition)
        columns = (*work.columns, *work.added_columns)
        check_kept(loaded.condition, columns)
        check_faces(loaded, columns, work.face_encoder)
        return loaded
    except Unusable as fault:
        return fault


def encode_rows(
    accepted: Sequence[Accepted],
    columns: Sequence[str],
    base: Base,
    work: Work,
    kept: np.ndarray | None = None,
) -> dict[str, torch.Tensor]:
    """The columns of pairs that have been read.

    `kept` are the pictures as the column `pixels` has them, from which all else is then made.
    """
    loaded = [one for _, one in accepted]
    pixels, condition_pixels, render = _drawn(loaded, work.size_px, kept)
    if "pixels" in columns:
        # What is made of them now shall be what would be made of that column later.
        pixels = pixels_of_bytes(bytes_of_pixels(pixels))
    batch = Batch(
        pairs=[pair for pair, _ in accepted],
        pixels=pixels,
        captions=[one.caption for one in loaded],
        references=[one.reference for one in loaded],
        face_encoder=work.face_encoder,
        render=render,
        maps=[one.maps for one in loaded],
        conditions=[one.condition for one in loaded if one.condition is not None],
        condition_pixels=condition_pixels,
        framings=[one.framing for one in loaded],
    )
    return {name: encoder_of(name)(base, batch) for name in columns}


def _drawn(
    loaded: Sequence[Loaded], size_px: int, kept: np.ndarray | None
) -> tuple[torch.Tensor, torch.Tensor, Render | None]:
    """Pixels of the pictures and of their conditions, in [-1, 1], and all that is known of the
    pictures where every one is a scene just drawn, without a condition."""
    pictures = [one.picture for one in loaded]
    others = [one.condition_picture for one in loaded if one.condition is not None]
    if kept is not None:
        other_pixels = draw(others, size_px)[0] if others else torch.empty(0, 3, size_px, size_px)
        return pixels_of_bytes(torch.from_numpy(kept)), other_pixels, None
    # Drawn together: what a pair's two scenes have in common is traced once.
    pixels, render = draw([*pictures, *others], size_px)
    return pixels[: len(pictures)], pixels[len(pictures) :], None if others else render
