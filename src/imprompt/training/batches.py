"""Which rows make up which step, and reading them ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch import Tensor

from imprompt.core.randomness import permutation
from imprompt.data.dataset import Columns


def rows_of_samples(samples: range, num_rows: int, seed: int) -> np.ndarray:
    """The rows that samples (counted from the run's start) see: every epoch is one permutation."""
    numbers = np.arange(samples.start, samples.stop)
    epochs, positions = np.divmod(numbers, num_rows)
    rows = np.empty(len(numbers), dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = permutation(seed, int(epoch), num_rows)[positions[here]]
    return rows


def batches(
    columns: Columns,
    names: tuple[str, ...],
    *,
    num_rows: int,
    seed: int,
    batch_size: int,
    first_step: int,
    last_step: int,
) -> Iterator[tuple[range, dict[str, Tensor]]]:
    """The batches of steps first_step … last_step - 1, each read while the one before is used."""

    def read(step: int) -> tuple[range, dict[str, Tensor]]:
        samples = range(step * batch_size, (step + 1) * batch_size)
        return samples, columns.rows(rows_of_samples(samples, num_rows, seed), names)

    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(read, first_step) if first_step < last_step else None
        for step in range(first_step, last_step):
            assert coming is not None
            batch = coming.result()
            coming = reader.submit(read, step + 1) if step + 1 < last_step else None
            yield batch
