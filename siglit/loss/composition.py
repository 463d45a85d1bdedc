"""Which pairs of a global batch count, and as what: masked negatives (paper, section 4.7) and ambiguous pairs.

Knows one tile at a time and histograms that are summed over ranks, never all pairs of a batch. Shapes: r texts × c
images of a tile.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

Ambiguous = Literal["drop", "positive"]
Keep = Literal["random", "hardest", "easiest"]

_BINS = 2**16
_SPARE_BINS = 2**10
STRIP = {"cpu": 2**18, "cuda": 2**21}
"""Pairs per strip of a tile by device: on a CPU they stay in the caches; on CUDA they are enough for all cores."""


@dataclass(frozen=True)
class Negatives:
    """Keep some of the global batch's negatives: `per_positive` per positive pair on average over the whole batch.

    All negatives that tie with the last one kept are kept too, so a few more may count where logits are equal.
    """

    keep: Keep
    """random; hardest: those with the largest logits; easiest: those with the smallest."""
    per_positive: float
    """Negatives kept per pair of the batch; a batch of n pairs has n − 1 per pair."""
    seed: int = 0
    """Seed of the random choice: pass another one at each step, the same on all ranks."""

    def __post_init__(self) -> None:
        if self.keep not in ("random", "hardest", "easiest") or not 0 <= self.per_positive < math.inf:
            raise ValueError(
                f"Negatives({self.keep!r}, {self.per_positive}): keep must be random, hardest or easiest, and "
                "per_positive a finite number of 0 or more"
            )


@dataclass(frozen=True)
class Tile:
    """Where a tile lies in the global batch, and the ids of the pairs of its rows and columns."""

    row: int
    """Index of its first text in the global batch."""
    column: int
    """Index of its first image in the global batch."""
    row_ids: list[torch.Tensor]
    """(r,) int64 each: image ids and text ids of the pairs that the rows' texts come from."""
    column_ids: list[torch.Tensor]
    """(c,) int64 each: image ids and text ids of the pairs that the columns' images come from."""

    def diagonal(self, cosines: torch.Tensor) -> torch.Tensor:
        """Return (r, c) bool: a text and its own image."""
        rows, columns = self._indices(cosines)
        return rows[:, None] == columns

    def shares_id(self, cosines: torch.Tensor) -> torch.Tensor:
        """Return (r, c) bool: pairs that share an id."""
        shared = torch.zeros_like(cosines, dtype=torch.bool)
        for of_rows, of_columns in zip(self.row_ids, self.column_ids, strict=True):
            shared |= of_rows[:, None] == of_columns
        return shared

    def priority(self, cosines: torch.Tensor, negatives: Negatives) -> torch.Tensor:
        """Return (r, c) signed integers of `priority_bits` bits: negatives with the largest priorities are kept."""
        if negatives.keep == "random":
            rows, columns = self._indices(cosines)
            # A 0-dim tensor on the CPU is an argument of the kernel: nothing is copied to the device.
            of_rows = _hash(rows + _hash(torch.tensor(negatives.seed)))
            priority = torch.empty_like(cosines, dtype=torch.int32)
            for strip in _strips(cosines):
                priority[strip] = _hash(of_rows[strip, None] + columns)
            return priority
        kind = torch.int32 if cosines.dtype == torch.float32 else torch.int64
        bits = cosines.contiguous().view(kind)
        # Floating-point numbers sort like their bits read as integers, in reverse order below zero.
        ordered = bits >> (torch.iinfo(kind).bits - 1)
        ordered.bitwise_and_(torch.iinfo(kind).max).bitwise_xor_(bits)
        return ordered if negatives.keep == "hardest" else ordered.bitwise_not_()

    def _indices(self, cosines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(self.row, self.row + cosines.shape[0], device=cosines.device)
        return rows, torch.arange(self.column, self.column + cosines.shape[1], device=cosines.device)


@dataclass(frozen=True)
class Selection:
    """Decides for each pair whether it counts and whether it is a positive."""

    ambiguous: Ambiguous
    negatives: Negatives | None
    threshold: torch.Tensor | None = None
    """Scalar, the smallest priority of a negative that is kept; None: none is."""

    def __call__(self, cosines: torch.Tensor, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (r, c) bool positive, (r, c) bool kept."""
        positive, negative = self.unmasked(cosines, tile)
        if self.negatives is not None:
            if self.threshold is None:
                negative.zero_()
            else:
                negative &= tile.priority(cosines, self.negatives) >= self.threshold
        return positive, negative.logical_or_(positive)

    def unmasked(self, cosines: torch.Tensor, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (r, c) bool positive, (r, c) bool negative before masking; a dropped ambiguous pair is neither."""
        positive, shared = tile.diagonal(cosines), tile.shares_id(cosines)
        if self.ambiguous == "positive":
            positive |= shared
        return positive, shared.logical_or_(positive).logical_not_()


def priority_bits(dtype: torch.dtype, negatives: Negatives) -> int:
    """Return how many bits a priority has, 32 or 64."""
    return 64 if dtype == torch.float64 and negatives.keep != "random" else 32


def find_threshold(
    count: Callable[[torch.Tensor | None, int], torch.Tensor], bits: int, keep: int
) -> torch.Tensor | None:
    """Find the smallest priority among the `keep` largest of the global batch's negatives, 16 bits of it at a time.

    The host never waits for the device: all that depends on the counts stays a tensor.

    Args:
        count: given `prefix` and `shift`, returns a (2^16,) int64 histogram of the 16 bits at `shift` of the priorities
            whose priority >> (shift + 16) is the scalar prefix (of all, if None), over the negatives of the global
            batch.
        bits: of a priority.
        keep: how many negatives to keep; all of them if there are fewer.

    Returns:
        Scalar of the priorities' type; None if `keep` is 0.
    """
    if keep == 0:
        return None
    # Of one element each: to index with a scalar, the host would read it.
    prefix, too_few, left = None, None, None
    for shift in range(bits - 16, -1, -16):
        counts = count(None if prefix is None else prefix.reshape(()), shift)
        at_least = counts.flip(0).cumsum(0)
        if left is None:
            left = torch.full_like(at_least[:1], keep)
            too_few = left > at_least[-1:]
        place = torch.searchsorted(at_least, left).clamp_(max=_BINS - 1)
        digit = _BINS - 1 - place
        left = left - at_least[place] + counts[digit]
        prefix = digit - _BINS // 2 if prefix is None else prefix * _BINS + digit
    assert prefix is not None
    assert too_few is not None
    threshold = torch.where(too_few, -(2 ** (bits - 1)), prefix)
    return threshold.to(torch.int32 if bits == 32 else torch.int64).reshape(())


def count_digits(
    priority: torch.Tensor, counted: torch.Tensor, bits: int, prefix: torch.Tensor | None, shift: int
) -> torch.Tensor:
    """Count the 16 bits at `shift` of priorities.

    Args:
        priority: (r, c) integers.
        counted: (r, c) bool, which of them count.
        bits: of a priority.
        prefix: scalar: only priorities that begin with these bits count; None: all.
        shift: how many bits follow the 16.

    Returns:
        (2^16,) int64 histogram.
    """
    # What does not count falls into further bins: to pick what counts, the host would wait to know how much that is.
    # Into many, because additions to one place are made one after the other on CUDA.
    histogram = torch.zeros(_BINS + _SPARE_BINS, dtype=torch.int64, device=priority.device)
    spare = torch.arange(priority.shape[1], dtype=torch.int32, device=priority.device) % _SPARE_BINS + _BINS
    one = torch.ones((), dtype=torch.int64, device=priority.device)
    for strip in _strips(priority):
        digit = (priority[strip] >> shift).bitwise_and_(_BINS - 1)
        if shift == bits - 16:
            digit ^= _BINS // 2  # flips the sign bit: negative priorities sort first
        ignored = ~counted[strip]
        if prefix is not None:
            ignored |= priority[strip] >> (shift + 16) != prefix
        digit = torch.where(ignored, spare.to(digit.dtype), digit)
        histogram.index_add_(0, digit.flatten(), one.expand(digit.numel()))
    return histogram[:_BINS]


def _strips(tile: torch.Tensor) -> Iterator[slice]:
    """Cut the rows of an (r, c) tile, so that temporaries of 8 bytes per pair stay smaller than the tile."""
    rows = max(1, STRIP.get(tile.device.type, STRIP["cuda"]) // tile.shape[1])
    for top in range(0, len(tile), rows):
        yield slice(top, top + rows)


def _hash(numbers: torch.Tensor) -> torch.Tensor:
    """Hash int64 numbers to 32-bit integers (the finalizer of MurmurHash3 on 64 bits)."""
    for _ in range(2):
        numbers = (numbers ^ ((numbers >> 33) & 0x7FFFFFFF)) * -0xAE502812AA7333
    return (numbers ^ ((numbers >> 33) & 0x7FFFFFFF)) >> 32
