"""Which pairs of a global batch count, and as what: masked negatives (paper, section 4.7) and ambiguous pairs.

Knows one tile at a time and histograms that are summed over ranks, never all pairs of a batch. Shapes: r texts × c
images of a tile.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Ambiguous = Literal["drop", "positive"]
Keep = Literal["random", "hardest", "easiest"]

_BINS = 2**16


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
        """Return (r, c) signed int64 of `priority_bits` bits: negatives with the largest priorities are kept."""
        if negatives.keep == "random":
            rows, columns = self._indices(cosines)
            return _hash(_hash(rows + _hash(torch.tensor(negatives.seed)))[:, None] + columns)
        kind = torch.int32 if cosines.dtype == torch.float32 else torch.int64
        bits = cosines.contiguous().view(kind)
        # Floating-point numbers sort like their bits read as integers, in reverse order below zero.
        ordered = torch.where(bits < 0, bits ^ torch.iinfo(kind).max, bits).to(torch.int64)
        return ordered if negatives.keep == "hardest" else -1 - ordered

    def _indices(self, cosines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(self.row, self.row + cosines.shape[0], device=cosines.device)
        return rows, torch.arange(self.column, self.column + cosines.shape[1], device=cosines.device)


@dataclass(frozen=True)
class Selection:
    """Decides for each pair whether it counts and whether it is a positive."""

    ambiguous: Ambiguous
    negatives: Negatives | None
    threshold: int = 0
    """Smallest priority of a negative that is kept."""

    def __call__(self, cosines: torch.Tensor, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (r, c) bool positive, (r, c) bool kept."""
        positive, negative = self.unmasked(cosines, tile)
        if self.negatives is not None:
            negative &= tile.priority(cosines, self.negatives) >= self.threshold
        return positive, negative | positive

    def unmasked(self, cosines: torch.Tensor, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (r, c) bool positive, (r, c) bool negative before masking; a dropped ambiguous pair is neither."""
        positive, shared = tile.diagonal(cosines), tile.shares_id(cosines)
        if self.ambiguous == "positive":
            positive |= shared
        return positive, ~(positive | shared)


def priority_bits(dtype: torch.dtype, negatives: Negatives) -> int:
    """Return how many bits a priority has, 32 or 64."""
    return 64 if dtype == torch.float64 and negatives.keep != "random" else 32


def find_threshold(count: Callable[[int | None, int], torch.Tensor], bits: int, keep: int) -> int:
    """Find the smallest priority among the `keep` largest of the global batch's negatives, 16 bits of it at a time.

    Args:
        count: given `prefix` and `shift`, returns a (2^16,) int64 histogram of the 16 bits at `shift` of the priorities
            whose priority >> (shift + 16) is the prefix (of all, if None), over the negatives of the global batch.
        bits: of a priority.
        keep: how many negatives to keep; all of them if there are fewer.
    """
    if keep == 0:
        return 2**63 - 1
    prefix = None
    for shift in range(bits - 16, -1, -16):
        counts = count(prefix, shift)
        at_least = counts.flip(0).cumsum(0)
        if keep >= int(at_least[-1]):
            return -(2 ** (bits - 1)) if prefix is None else prefix << (shift + 16)
        place = int(torch.searchsorted(at_least, keep))
        digit = len(counts) - 1 - place
        keep -= int(at_least[place] - counts[digit])
        prefix = digit - _BINS // 2 if prefix is None else prefix * _BINS + digit
    assert prefix is not None
    return prefix


def count_digits(priority: torch.Tensor, bits: int, prefix: int | None, shift: int) -> torch.Tensor:
    """Return a (2^16,) int64 histogram of the 16 bits at `shift` of the (k,) priorities that begin with `prefix`."""
    if prefix is not None:
        priority = priority[priority >> (shift + 16) == prefix]
    digit = (priority >> shift) & (_BINS - 1)
    if shift == bits - 16:
        digit ^= _BINS // 2  # flips the sign bit: negative priorities sort first
    return torch.bincount(digit, minlength=_BINS)


def _hash(numbers: torch.Tensor) -> torch.Tensor:
    """Hash int64 numbers to 32-bit integers (the finalizer of MurmurHash3 on 64 bits)."""
    for _ in range(2):
        numbers = (numbers ^ ((numbers >> 33) & 0x7FFFFFFF)) * -0xAE502812AA7333
    return (numbers ^ ((numbers >> 33) & 0x7FFFFFFF)) >> 32
