"""Which rows make up which step, and reading them ahead of time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from imprompt.core.errors import ImpromptError
from imprompt.data.rows import Fetched, Rows, part_ends
from imprompt.training.config import TrainConfig
from imprompt.training.order import rows_of_samples


@dataclass(frozen=True)
class Batch:
    """A part of a step's samples: their numbers counted from the run's start, and their rows."""

    samples: range
    rows: np.ndarray
    columns: dict[str, Tensor]


def equal_parts(samples: range, num_parts: int) -> list[range]:
    """Samples cut into equal parts, in order."""
    size = len(samples) // num_parts
    return [samples[i * size : (i + 1) * size] for i in range(num_parts)]


def num_trained_rows(data: Rows, config: TrainConfig) -> int:
    """How many rows there are to train on: all but the last, which are held out for validation.

    Raises:
        ImpromptError: none is left.
    """
    num_rows = len(data) - config.validation_rows
    if num_rows < 1:
        raise ImpromptError(
            f"{data.path} has {len(data)} rows and {config.validation_rows} are held out for "
            "validation: nothing is left to train on. Prepare more pairs, or hold out fewer: --set "
            f"train.validation_rows={len(data) // 10}."
        )
    return num_rows


def batches(
    data: Rows,
    names: tuple[str, ...],
    *,
    num_rows: int,
    seed: int,
    batch_size: int,
    first_step: int,
    last_step: int,
    process: int = 0,
    num_processes: int = 1,
    num_parts: int = 1,
    read_ahead: int = 1,
) -> Iterator[list[Batch]]:
    """For each step first_step … last_step - 1 a process's share of the batch, in `num_parts` parts.

    Which samples a step sees depends on neither the processes nor how far ahead is read.
    """

    ends = part_ends(data)

    def of_step(step: int) -> list[tuple[range, np.ndarray]]:
        samples = range(step * batch_size, (step + 1) * batch_size)
        mine = equal_parts(samples, num_processes)[process]
        return [
            (part, rows_of_samples(part, num_rows, seed, ends))
            for part in equal_parts(mine, num_parts)
        ]

    def read(step: int) -> list[tuple[range, np.ndarray, Fetched]]:
        return [(samples, rows, data.fetch(rows, names)) for samples, rows in of_step(step)]

    coming: deque[Future[list[tuple[range, np.ndarray, Fetched]]]] = deque()
    reader = ThreadPoolExecutor(max_workers=read_ahead)
    try:
        for step in range(first_step, last_step):
            while len(coming) < read_ahead and step + len(coming) < last_step:
                coming.append(reader.submit(read, step + len(coming)))
            parts = coming.popleft().result()
            if step + 1 + len(coming) < last_step:
                coming.append(reader.submit(read, step + 1 + len(coming)))
            yield [Batch(samples, rows, fetched()) for samples, rows, fetched in parts]
    finally:
        reader.shutdown(wait=False, cancel_futures=True)
