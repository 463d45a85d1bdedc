"""The order of a pass: units mixed within windows, the same batches for every rank and from every start."""

import itertools

import numpy as np
import pytest

from siglit.data.order import RankShare, WindowOrder

COUNTS = np.array([0, 0, 3, 1, 0, 0, 0, 0, 5, 0])
"""Ten units, most of them empty: with two or three of them in a window, whole windows are."""
STARTS = np.concatenate([[0], np.cumsum(COUNTS)])


def order(seed=3, window_units=2):
    return WindowOrder(COUNTS, lambda unit: np.arange(STARTS[unit], STARTS[unit + 1]), seed, window_units)


def rows_of(windows):
    return np.concatenate([np.empty(0, np.int64), *(window.own for window in windows)]).tolist()


@pytest.mark.parametrize("window_units", [1, 2, 3, 10])
@pytest.mark.parametrize("epoch", range(3))
def test_a_pass_has_every_row_once_whatever_units_are_empty(epoch, window_units):
    batches = list(order(window_units=window_units).global_batches(epoch, 0, 1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(9))


@pytest.mark.parametrize("window_units", [1, 2, 10])
@pytest.mark.parametrize(("size", "world_size"), [(1, 1), (2, 1), (2, 2), (4, 2), (6, 3), (9, 3)])
def test_windows_of_the_ranks_are_the_global_batches(window_units, size, world_size):
    """From every batch on, in the middle of windows too; a rank may have no row of a window."""
    passes = order(window_units=window_units)
    whole = list(passes.global_batches(1, 0, size))
    assert len(whole) == 9 // size
    for first, rank in itertools.product(range(len(whole) + 1), range(world_size)):
        share = RankShare(size, rank, world_size)
        expected = [row for batch in whole[first:] for row in batch[share.slice].tolist()]
        assert rows_of(passes.windows(1, first, share)) == expected
        resumed = list(passes.global_batches(1, first, size))
        assert np.array_equal(np.concatenate([[], *resumed]), np.concatenate([[], *whole[first:]]))


def test_windows_before_the_first_batch_are_not_read():
    units = []
    passes = WindowOrder(np.full(6, 4), lambda unit: units.append(unit) or np.arange(4 * unit, 4 * unit + 4), 0, 2)
    list(passes.windows(0, 3, RankShare(4)))
    assert len(units) == 4, "the two windows from row 12 on; row 8 begins the first of them"


def test_the_order_is_that_of_earlier_runs():
    """A checkpoint counts batches of this order: another order would show rows twice and others not at all."""

    def rows(epoch, window_units):
        return np.concatenate(list(order(7, window_units).global_batches(epoch, 0, 3))).tolist()

    assert rows(0, 2) == [4, 5, 6, 7, 8, 3, 1, 0, 2]
    assert rows(1, 2) == [5, 7, 4, 6, 8, 3, 1, 0, 2]
    assert rows(0, 10) == [0, 1, 5, 7, 4, 2, 6, 8, 3]
    assert rows(1, 10) == [5, 3, 1, 6, 7, 0, 2, 8, 4]


def test_an_order_of_no_rows_is_empty():
    empty = WindowOrder(np.zeros(3, np.int64), lambda unit: np.empty(0, np.int64), 0, 2)
    assert empty.count == 0
    assert list(empty.global_batches(0, 0, 1)) == []
    assert rows_of(empty.windows(0, 0, RankShare(1))) == []
