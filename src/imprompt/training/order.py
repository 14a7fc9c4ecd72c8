"""In which order a run sees its rows: at random, and without a list of them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from imprompt.core.randomness import generator, permuted
from imprompt.data.rows import PARTS_AT_ONCE


def rows_of_samples(
    samples: range,
    num_rows: int,
    seed: int,
    ends: np.ndarray | None = None,
    parts_at_once: int = PARTS_AT_ONCE,
) -> np.ndarray:
    """The rows that samples (counted from the run's start) see: every epoch is one permutation.

    With the `ends` of parts, of which the first `num_rows` rows are meant, and more than `parts_at_once` of
    them, the parts are shuffled, and then the rows of so many parts at a time.
    """
    numbers = np.arange(samples.start, samples.stop)
    epochs, positions = np.divmod(numbers, num_rows)
    rows = np.empty(len(numbers), dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        if ends is None or len(ends) <= parts_at_once:
            rows[here] = permuted(seed, epoch, positions[here], num_rows)
        else:
            order = _parts_in_order(seed, epoch, len(ends))
            rows[here] = _by_windows(
                seed, epoch, positions[here], np.minimum(ends, num_rows), order, parts_at_once
            )
    return rows


@lru_cache(maxsize=4)
def _parts_in_order(seed: int, epoch: int, num_parts: int) -> np.ndarray:
    return generator(seed, epoch, "order of parts").permutation(num_parts)


def _by_windows(
    seed: int,
    epoch: int,
    positions: np.ndarray,
    ends: np.ndarray,
    order: np.ndarray,
    parts_at_once: int,
) -> np.ndarray:
    begins = np.concatenate(([0], ends[:-1]))
    # Of the parts in their order: where each ends in the epoch, and where each window does.
    reached = np.cumsum((ends - begins)[order])
    window_ends = np.append(reached[parts_at_once - 1 : -1 : parts_at_once], reached[-1])
    window_begins = np.concatenate(([0], window_ends[:-1]))
    windows = np.searchsorted(window_ends, positions, side="right")
    places = np.empty(len(positions), dtype=np.int64)
    for window in np.unique(windows).tolist():
        here, first = windows == window, int(window_begins[window])
        length = int(window_ends[window]) - first
        # Another permutation for each window of each epoch.
        number = epoch * len(window_ends) + window
        places[here] = first + permuted(seed, number, positions[here] - first, length)
    parts = np.searchsorted(reached, places, side="right")
    within = places - np.concatenate(([0], reached[:-1]))[parts]
    return begins[order[parts]] + within
