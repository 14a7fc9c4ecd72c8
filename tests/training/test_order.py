"""The order of a run: every row once an epoch, and few parts at a time where parts are dear to open."""

import numpy as np
import pytest

from imprompt.training.order import rows_of_samples

SIZES = [7, 1, 12, 5, 9, 3, 8, 11, 2, 6]
ENDS = np.cumsum(SIZES)


@pytest.mark.parametrize("held_out", [0, 2, 7, 30])
@pytest.mark.parametrize("parts_at_once", [1, 3, 4, 5])
def test_every_row_once_an_epoch(held_out, parts_at_once):
    num_rows = int(ENDS[-1]) - held_out
    epochs = [
        rows_of_samples(range(e * num_rows, (e + 1) * num_rows), num_rows, 5, ENDS, parts_at_once)
        for e in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_rows))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # Asked for piece by piece, as steps do, and across epochs, it is the same.
    pieces = [
        rows_of_samples(range(i, i + 9), num_rows, 5, ENDS, parts_at_once)
        for i in range(0, 2 * num_rows - 9, 9)
    ]
    together = np.concatenate(epochs)
    assert np.array_equal(np.concatenate(pieces), together[: 9 * len(pieces)])


def test_rows_of_few_parts_come_together():
    num_rows = int(ENDS[-1])
    rows = rows_of_samples(range(num_rows), num_rows, 0, ENDS, 3)
    parts = np.searchsorted(ENDS, rows, side="right").tolist()
    seen = [parts.index(part) for part in range(len(SIZES))]
    last = [len(parts) - parts[::-1].index(part) for part in range(len(SIZES))]
    windows = sorted(zip(seen, last, strict=True))
    open_at_once = [sum(a <= i < b for a, b in windows) for i in range(num_rows)]
    assert max(open_at_once) <= 3
    assert parts != sorted(parts)


def test_where_parts_are_few_all_rows_are_mixed():
    num_rows = int(ENDS[-1])
    plain = rows_of_samples(range(num_rows), num_rows, 1)
    assert np.array_equal(rows_of_samples(range(num_rows), num_rows, 1, ENDS, len(ENDS)), plain)
