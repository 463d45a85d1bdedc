"""The order of a pass: which rows make up which batch, drawn from (seed, pass), the same for any number of ranks.

Knows rows and counts, not what is read for them: reading is a function that it is given. Shapes: N rows of the cache,
C of them with captions, G pairs of a global batch over all ranks, B = G / ranks of them on this one.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from siglit.cache import EmbeddingCache
from siglit.data.sources import Source
from siglit.runtime.machine import free_memory as _free_memory

Arrays = dict[str, np.ndarray]
Fetch = Callable[[np.ndarray], Arrays]
"""(k,) int64 rows to arrays of k rows each."""

BLOCK_ROWS = 4096
WINDOW_BLOCKS = 32

_SCAN = 1 << 20
_MASK = (1 << 64) - 1


class Share(NamedTuple):
    """One rank's part of every global batch."""

    total: int
    """G, a multiple of `ranks`."""
    rank: int = 0
    ranks: int = 1

    @property
    def own(self) -> int:
        """B."""
        return self.total // self.ranks


def choose_shuffle(cache: EmbeddingCache) -> tuple[Literal["rows", "blocks"], str]:
    """Return how to shuffle a cache on this machine, and why, in words.

    Random rows of a cache that does not stay in memory cost one page fault each; half of the free memory is left to
    the training itself.
    """
    return _choose(len(cache) * cache.dim * 2, "embeddings")


def choose_image_shuffle(source: Source, processes: int) -> tuple[Literal["rows", "blocks"], str]:
    """Return how to shuffle a source whose samples each of a machine's `processes` would hold, and why, in words."""
    return _choose(source.memory() * processes, "images and captions")


def choose_captions(seed: int, epoch: int, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Draw one of each row's captions: a hash of (seed, epoch, row), so that nothing per row has to be kept.

    Args:
        seed: of the run.
        epoch: number of the pass.
        rows: (k,) int64.
        counts: (k,) captions of each row, 1 … 2³².

    Returns:
        (k,) int64 in [0, counts), uniform to within counts / 2³².
    """
    high = draw(seed, epoch, rows) >> np.uint64(32)
    return (high * counts.astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def draw(*words: int | np.ndarray) -> np.ndarray:
    """Hash numbers to uniform 64-bit ones: the same for the same words in the same order, and as if independent else.

    Args:
        words: whole numbers and arrays of them, taken modulo 2⁶⁴, that broadcast; at least one is an array.

    Returns:
        uint64 of the shape that they broadcast to.

    Source: SplitMix64 (Steele, Lea and Flood 2014), https://prng.di.unimi.it/splitmix64.c
    """
    # An array from the start: numpy warns of the overflow that is meant where both numbers are scalars.
    state = np.zeros(1, np.uint64)
    for word in words:
        whole = word if isinstance(word, np.ndarray) else np.array(int(word) & _MASK, np.uint64)
        state = _splitmix64(state ^ whole.astype(np.uint64))
    return state


class RowShuffle:
    """An exact permutation of all captioned rows.

    Holds the captioned rows and, during a pass, their permutation: 4 bytes each (8 above 2³² rows).
    """

    def __init__(self, caption_offsets: np.ndarray, seed: int):
        """Take (N + 1,) caption offsets."""
        rows = len(caption_offsets) - 1
        kind = np.uint32 if rows <= 1 << 32 else np.int64
        found = [
            (first + _captioned(caption_offsets, first, min(first + _SCAN, rows))).astype(kind)
            for first in range(0, rows, _SCAN)
        ]
        self._rows = np.concatenate([np.empty(0, kind), *found])
        self._seed = seed
        self.count = len(self._rows)
        """C."""

    def batches(self, epoch: int, first: int, share: Share, fetch: Fetch) -> Iterator[Arrays]:
        """Yield a rank's part of the pass's global batches, from number `first` on; an incomplete one is dropped."""
        order = self._rows.copy()
        np.random.default_rng((self._seed, epoch, 0)).shuffle(order)
        for number in range(first, self.count // share.total):
            start = number * share.total + share.rank * share.own
            yield fetch(order[start : start + share.own].astype(np.int64))


class BlockShuffle:
    """Blocks of consecutive rows in random order, their rows mixed within windows of many blocks.

    A window is read in the order of the cache while the one before it is dealt out, so that a disk sees long reads;
    two windows of this rank's rows are in memory, and nothing per row of the cache. Rows further apart in the drawn
    order of blocks than a window never meet in a batch (but for one that spans two windows).
    """

    def __init__(self, caption_offsets: np.ndarray, seed: int):
        """Take (N + 1,) caption offsets; they are read block by block."""
        self._offsets, self._seed = caption_offsets, seed
        rows = len(caption_offsets) - 1
        self._first = np.arange(0, rows, BLOCK_ROWS)
        self._counts = np.array([len(self._block(first)) for first in self._first.tolist()], np.int64)
        self.count = int(self._counts.sum())
        """C."""

    def batches(self, epoch: int, first: int, share: Share, fetch: Fetch) -> Iterator[Arrays]:
        """Yield a rank's part of the pass's global batches, from number `first` on; an incomplete one is dropped."""
        windows = (_Window(rows, fetch) for rows in self._windows(epoch, first, share))
        now, following = next(windows, None), next(windows, None)
        for _ in range(first, self.count // share.total):
            pieces, missing = [], share.own
            while missing:
                assert now is not None
                piece, size = now.take(missing)
                if following is not None:
                    following.read(size)
                if size:
                    pieces.append(piece)
                    missing -= size
                if missing:
                    now, following = following, next(windows, None)
            yield {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _windows(self, epoch: int, first: int, share: Share) -> Iterator[np.ndarray]:
        """This rank's rows of each window in the order they are dealt, from the window of batch `first` on."""
        blocks = np.random.default_rng((self._seed, epoch, 0)).permutation(len(self._first))
        end = 0
        for number, start in enumerate(range(0, len(blocks), WINDOW_BLOCKS)):
            chosen = blocks[start : start + WINDOW_BLOCKS]
            begin, end = end, end + int(self._counts[chosen].sum())
            if end <= first * share.total:
                continue
            rows = np.concatenate([self._block(int(self._first[block])) for block in chosen])
            np.random.default_rng((self._seed, epoch, 2, number)).shuffle(rows)
            place = np.arange(begin, end)
            own = place % share.total // share.own == share.rank
            own &= (place >= first * share.total) & (place < self.count // share.total * share.total)
            yield rows[own]

    def _block(self, first: int) -> np.ndarray:
        """Captioned rows of the block that begins at row `first`, ascending int64."""
        return first + _captioned(self._offsets, first, min(first + BLOCK_ROWS, len(self._offsets) - 1))


class _Window:
    """Rows of one window, read in the order of the cache, dealt out in the order given."""

    def __init__(self, rows: np.ndarray, fetch: Fetch):
        self._rows, self._fetch = rows, fetch
        self._by_row = np.argsort(rows)
        self._arrays: Arrays | None = None
        self._read = self._dealt = 0

    def read(self, count: int) -> None:
        """Read the next `count` rows, or as many as are left."""
        part = self._by_row[self._read : self._read + count]
        if not len(part):
            return
        found = self._fetch(self._rows[part])
        if self._arrays is None:
            self._arrays = {name: np.empty((len(self._rows), *a.shape[1:]), a.dtype) for name, a in found.items()}
        for name, array in found.items():
            self._arrays[name][part] = array
        self._read += len(part)

    def take(self, count: int) -> tuple[Arrays, int]:
        """Return the next rows, at most `count`, as views, and how many they are."""
        while self._read < len(self._rows):
            self.read(BLOCK_ROWS)
        start, self._dealt = self._dealt, min(self._dealt + count, len(self._rows))
        return {k: a[start : self._dealt] for k, a in (self._arrays or {}).items()}, self._dealt - start


def _choose(size: int, what: str) -> tuple[Literal["rows", "blocks"], str]:
    free = _free_memory()
    told = f"{size / 1e9:,.2f} GB of {what}, {free / 1e9:,.1f} GB of memory free"
    return ("blocks" if size > free / 2 else "rows"), told


def _captioned(offsets: np.ndarray, first: int, last: int) -> np.ndarray:
    """Rows in [first, last) that have captions, counted from `first`, int64."""
    return np.flatnonzero(offsets[first + 1 : last + 1] > offsets[first:last])


def _splitmix64(state: np.ndarray) -> np.ndarray:
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
