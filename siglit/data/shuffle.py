"""Batches of a cache's captioned rows in shuffled order, by rows or by blocks; and the choice between the two.

Knows rows and counts, not what is read for them: reading is a function that it is given. The order of blocks is drawn
in `order.py`. Shapes: N rows of the cache, C of them with captions, G pairs of a global batch over all ranks,
B = G / ranks of them on this one.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import numpy as np

from siglit.cache import EmbeddingCache
from siglit.data.order import RankShare, WindowOrder
from siglit.data.sources.samples import Source
from siglit.runtime.machine import free_memory

Arrays = dict[str, np.ndarray]
Fetch = Callable[[np.ndarray], Arrays]
"""(k,) int64 rows to arrays of k rows each."""

BLOCK_ROWS = 4096
WINDOW_BLOCKS = 32

_SCAN = 1 << 20


def choose_shuffle(cache: EmbeddingCache) -> tuple[Literal["rows", "blocks"], str]:
    """Return how to shuffle a cache on this machine, and the reason for a message.

    Random rows of a cache that does not stay in memory cost one page fault each; half of the free memory is left to
    the training itself.
    """
    return _choose(len(cache) * cache.dim * 2, "embeddings")


def choose_image_shuffle(source: Source, processes: int) -> tuple[Literal["rows", "blocks"], str]:
    """Return how to shuffle a source whose samples each of a machine's `processes` would hold, and the reason."""
    return _choose(source.memory() * processes, "images and captions")


class RowShuffle:
    """An exact permutation of all captioned rows.

    Holds the captioned rows and, during a pass, their permutation: 4 bytes each (8 above 2³² rows).
    """

    def __init__(self, caption_offsets: np.ndarray, seed: int):
        """Take (N + 1,) caption offsets."""
        rows = len(caption_offsets) - 1
        dtype = np.uint32 if rows <= 1 << 32 else np.int64
        parts = [
            (first + _captioned(caption_offsets, first, min(first + _SCAN, rows))).astype(dtype)
            for first in range(0, rows, _SCAN)
        ]
        self._rows = np.concatenate([np.empty(0, dtype), *parts])
        self._seed = seed
        self.count = len(self._rows)
        """C."""

    def batches(self, epoch: int, first: int, share: RankShare, fetch: Fetch) -> Iterator[Arrays]:
        """Yield a rank's part of the pass's global batches, from number `first` on; an incomplete one is dropped."""
        for batch in self.global_batches(epoch, first, share.global_size):
            yield fetch(batch[share.slice])

    def global_batches(self, epoch: int, first: int, size: int) -> Iterator[np.ndarray]:
        """Yield the (size,) int64 rows of each global batch of a pass, from number `first` on."""
        order = self._rows.copy()
        np.random.default_rng((self._seed, epoch, 0)).shuffle(order)
        for number in range(first, self.count // size):
            yield order[number * size : (number + 1) * size].astype(np.int64)


class BlockShuffle:
    """Blocks of consecutive rows in random order, their rows mixed within windows of many blocks.

    A window is read in the order of the cache while the batches of the one before it are made, so that a disk sees
    long reads; two windows of this rank's rows are in memory, and nothing per row of the cache.
    """

    def __init__(self, caption_offsets: np.ndarray, seed: int):
        """Take (N + 1,) caption offsets; they are read block by block."""
        rows_of = partial(_block_rows, caption_offsets)
        blocks = -(-(len(caption_offsets) - 1) // BLOCK_ROWS)
        counts = np.array([len(rows_of(block)) for block in range(blocks)], np.int64)
        self._order = WindowOrder(counts, rows_of, seed, WINDOW_BLOCKS)
        self.count = self._order.count
        """C."""

    def batches(self, epoch: int, first: int, share: RankShare, fetch: Fetch) -> Iterator[Arrays]:
        """Yield a rank's part of the pass's global batches, from number `first` on; an incomplete one is dropped."""
        windows = (_ArrayWindow(window.own, fetch) for window in self._order.windows(epoch, first, share))
        now, following = next(windows, None), next(windows, None)
        for _ in range(first, self.count // share.global_size):
            pieces, missing = [], share.size
            while missing > 0:
                assert now is not None
                piece, size = now.take(missing)
                if following is not None:
                    following.read(size)
                if size > 0:
                    pieces.append(piece)
                    missing -= size
                if missing > 0:
                    now, following = following, next(windows, None)
            yield {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def global_batches(self, epoch: int, first: int, size: int) -> Iterator[np.ndarray]:
        """Yield the (size,) int64 rows of each global batch of a pass, from number `first` on."""
        return self._order.global_batches(epoch, first, size)


class _ArrayWindow:
    """Rows of one window, read in the order of the cache and taken in the order given."""

    def __init__(self, rows: np.ndarray, fetch: Fetch):
        self._rows, self._fetch = rows, fetch
        self._by_row = np.argsort(rows)
        self._arrays: Arrays | None = None
        self._read = self._taken = 0

    def read(self, count: int) -> None:
        """Read the next `count` rows, or as many as are left."""
        part = self._by_row[self._read : self._read + count]
        if len(part) == 0:
            return
        fetched = self._fetch(self._rows[part])
        if self._arrays is None:
            self._arrays = {name: np.empty((len(self._rows), *a.shape[1:]), a.dtype) for name, a in fetched.items()}
        for name, array in fetched.items():
            self._arrays[name][part] = array
        self._read += len(part)

    def take(self, count: int) -> tuple[Arrays, int]:
        """Return the next rows, at most `count`, as views, and how many they are."""
        while self._read < len(self._rows):
            self.read(BLOCK_ROWS)
        start, self._taken = self._taken, min(self._taken + count, len(self._rows))
        return {k: a[start : self._taken] for k, a in (self._arrays or {}).items()}, self._taken - start


def _choose(size: int, what: str) -> tuple[Literal["rows", "blocks"], str]:
    free = free_memory()
    reason = f"{size / 1e9:,.2f} GB of {what}, {free / 1e9:,.1f} GB of memory free"
    return ("blocks" if size > free / 2 else "rows"), reason


def _block_rows(offsets: np.ndarray, block: int) -> np.ndarray:
    """Captioned rows of a block, ascending int64."""
    first = block * BLOCK_ROWS
    return first + _captioned(offsets, first, min(first + BLOCK_ROWS, len(offsets) - 1))


def _captioned(offsets: np.ndarray, first: int, last: int) -> np.ndarray:
    """Rows in [first, last) that have captions, counted from `first`, int64."""
    return np.flatnonzero(offsets[first + 1 : last + 1] > offsets[first:last])
