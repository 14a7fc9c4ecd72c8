"""Random numbers are a function of seed, purpose and sample, and of nothing else."""

import numpy as np
import pytest
import torch

from imprompt.core.randomness import Randomness, generator, permuted


def test_a_sample_draws_the_same_in_any_batch():
    together, alone = Randomness(3, [5, 9, 2]), Randomness(3, [9])
    assert torch.equal(together.normal("noise", (4, 2))[1], alone.normal("noise", (4, 2))[0])
    assert together.uniform("t")[1] == alone.uniform("t")[0]
    assert together.integers("k", 1000)[1] == alone.integers("k", 1000)[0]


def test_asking_twice_gives_the_same_and_order_does_not_matter():
    first, second = Randomness(0, range(4)), Randomness(0, range(4))
    noise = first.normal("noise", (3,))
    second.uniform("other")
    assert torch.equal(noise, second.normal("noise", (3,)))
    assert torch.equal(noise, first.normal("noise", (3,)))


@pytest.mark.parametrize("other", [(1, 0, "a"), (0, 1, "a"), (0, 0, "b")])
def test_seed_sample_and_purpose_each_matter(other):
    assert not np.array_equal(generator(0, 0, "a").random(4), generator(*other).random(4))


def test_the_numbers_are_as_they_should_be():
    draws = Randomness(1, range(4000))
    assert draws.normal("n", (8,)).mean().abs() < 0.02
    assert (draws.normal("n", (8,)).std() - 1).abs() < 0.02
    uniform = draws.uniform("u")
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02
    assert set(draws.integers("i", 3).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("length", [1, 2, 3, 50, 1000, 4097])
def test_an_epoch_visits_every_row_once_in_an_order_of_its_own(length):
    positions = np.arange(length)
    first, second = (permuted(0, epoch, positions, length) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(length))
    if length > 3:
        assert list(first) != list(second) and list(first) != list(positions)


def test_where_an_epoch_is_at_a_position_does_not_depend_on_what_else_is_asked_for():
    everything = permuted(5, 2, np.arange(1000), 1000)
    assert np.array_equal(permuted(5, 2, np.array([7, 999, 3]), 1000), everything[[7, 999, 3]])


def test_the_order_of_a_billion_rows_costs_no_memory_and_mixes_well():
    length = 10**9
    rows = permuted(1, 0, np.arange(4000), length)
    assert len(set(rows.tolist())) == 4000 and rows.min() >= 0 and rows.max() < length
    # Neighbours of one batch lie anywhere: means and correlation as of independent rows.
    share = rows / length
    assert abs(share.mean() - 0.5) < 0.03 and abs(share.std() - 12**-0.5) < 0.02
    assert abs(np.corrcoef(share[:-1], share[1:])[0, 1]) < 0.06
