"""The order of a pass: which rows make up which batch, drawn from (seed, epoch), the same for any number of ranks.

Knows rows and counts, not what is read for them. Shapes: C rows, G pairs of a global batch, B = G / ranks of them on
this rank.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np


class RankShare(NamedTuple):
    """One rank's part of every global batch."""

    global_size: int
    """G, a multiple of `world_size`."""
    rank: int = 0
    world_size: int = 1

    @property
    def size(self) -> int:
        """B."""
        return self.global_size // self.world_size

    @property
    def slice(self) -> slice:
        """Where the part lies in the global batch."""
        return slice(self.rank * self.size, (self.rank + 1) * self.size)


class OrderWindow(NamedTuple):
    """Rows that are mixed with one another."""

    rows: np.ndarray
    """(k,) int64 rows of all ranks, in the order of the pass."""
    own: np.ndarray
    """Those of them that are this rank's, in the same order."""


class WindowOrder:
    """Units of rows in random order, their rows mixed within windows of several units.

    A batch has rows of one window, or of successive ones where it spans their border. In memory are the rows of one
    window and a count per unit.
    """

    def __init__(self, counts: np.ndarray, rows_of: Callable[[int], np.ndarray], seed: int, window_units: int):
        """Prepare the passes.

        Args:
            counts: (units,) int64, rows of each unit.
            rows_of: the rows of a unit, int64.
            seed: of the run.
            window_units: units of a window.
        """
        self._counts, self._rows_of, self._seed, self._window_units = counts, rows_of, seed, window_units
        self.count = int(counts.sum())
        """C."""

    def windows(self, epoch: int, first: int, share: RankShare) -> Iterator[OrderWindow]:
        """Yield the windows of a pass, beginning with the one in which global batch `first` begins.

        Rows of earlier batches and of an incomplete last batch belong to no rank.
        """
        start, stop = first * share.global_size, self.count // share.global_size * share.global_size
        for begin, rows in self._windows(epoch, start):
            position = np.arange(begin, begin + len(rows))
            own = position % share.global_size // share.size == share.rank
            own &= (position >= start) & (position < stop)
            yield OrderWindow(rows, rows[own])

    def global_batches(self, epoch: int, first: int, size: int) -> Iterator[np.ndarray]:
        """Yield the (size,) int64 rows of each global batch of a pass, from number `first` on."""
        left = np.empty(0, np.int64)
        for begin, rows in self._windows(epoch, first * size):
            left = np.concatenate([left, rows[max(0, first * size - begin) :]])
            while len(left) >= size:
                batch, left = left[:size], left[size:]
                yield batch

    def _windows(self, epoch: int, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first position in the pass, and the rows, of each window that ends behind position `start`."""
        units = np.random.default_rng((self._seed, epoch, 0)).permutation(len(self._counts))
        end = 0
        for number, first in enumerate(range(0, len(units), self._window_units)):
            chosen = units[first : first + self._window_units]
            begin, end = end, end + int(self._counts[chosen].sum())
            if end <= start:
                continue
            rows = np.concatenate([self._rows_of(unit) for unit in chosen.tolist()])
            np.random.default_rng((self._seed, epoch, 2, number)).shuffle(rows)
            yield begin, rows
