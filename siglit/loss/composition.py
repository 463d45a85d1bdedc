"""Which pairs of a global batch count, and as what: masked negatives (paper, section 4.7) and ambiguous pairs.

Knows one tile at a time and the histograms that ranks add up, never a batch's whole square. Shapes: r own rows (texts)
× c visiting rows (images).
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
    """Keep some of the global batch's negatives: `per_positive` for each positive pair, over the whole batch.

    The last one's equals are kept too, so that a few more may count where logits are the same.
    """

    keep: Keep
    """random; hardest: of the largest logits; easiest: of the smallest."""
    per_positive: float
    """Negatives kept for each pair of the batch; it has as many as its size − 1."""
    seed: int = 0
    """Of the random choice; another one for each step, the same on all ranks."""

    def __post_init__(self) -> None:
        if self.keep not in ("random", "hardest", "easiest") or not 0 <= self.per_positive < math.inf:
            raise ValueError(
                f"Negatives({self.keep!r}, {self.per_positive}): keep must be random, hardest or easiest, and "
                "per_positive a finite number of 0 or more"
            )


@dataclass(frozen=True)
class Tile:
    """Where a tile lies in the global batch, and the ids of its rows and columns."""

    row: int
    """Global number of its first text."""
    column: int
    """Global number of its first image."""
    own_ids: list[torch.Tensor]
    """(r,) int64 each: of the images and texts of the own pairs."""
    visiting_ids: list[torch.Tensor]
    """(c,) int64 each: of the images and texts of the visiting pairs."""

    def diagonal(self, cosines: torch.Tensor) -> torch.Tensor:
        """(r, c) bool: a text and its own image."""
        rows, columns = self._numbers(cosines)
        return rows[:, None] == columns

    def same(self, cosines: torch.Tensor) -> torch.Tensor:
        """(r, c) bool: pairs that share an id."""
        found = torch.zeros_like(cosines, dtype=torch.bool)
        for own, visiting in zip(self.own_ids, self.visiting_ids, strict=True):
            found |= own[:, None] == visiting
        return found

    def priority(self, cosines: torch.Tensor, negatives: Negatives) -> torch.Tensor:
        """(r, c) int64 of `priority_bits`, signed: the larger, the sooner a negative is kept."""
        if negatives.keep == "random":
            rows, columns = self._numbers(cosines)
            return _hash(_hash(rows + _hash(torch.tensor(negatives.seed)))[:, None] + columns)
        kind = torch.int32 if cosines.dtype == torch.float32 else torch.int64
        bits = cosines.contiguous().view(kind)
        # The order of floating-point numbers is that of their bits as integers, turned round below zero.
        ordered = torch.where(bits < 0, bits ^ torch.iinfo(kind).max, bits).to(torch.int64)
        return ordered if negatives.keep == "hardest" else -1 - ordered

    def _numbers(self, cosines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(self.row, self.row + cosines.shape[0], device=cosines.device)
        return rows, torch.arange(self.column, self.column + cosines.shape[1], device=cosines.device)


@dataclass(frozen=True)
class Selection:
    """What decides of each pair whether it counts and whether it is a positive."""

    ambiguous: Ambiguous
    negatives: Negatives | None
    least: int = 0
    """Smallest priority of a negative that is kept."""

    def __call__(self, cosines: torch.Tensor, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (r, c) bool positive, (r, c) bool kept."""
        positive, candidate = self.kinds(cosines, tile)
        if self.negatives is not None:
            candidate &= tile.priority(cosines, self.negatives) >= self.least
        return positive, candidate | positive

    def kinds(self, cosines: torch.Tensor, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (r, c) bool positive, (r, c) bool negative before any is masked; ambiguous pairs may be neither."""
        positive, same = tile.diagonal(cosines), tile.same(cosines)
        if self.ambiguous == "positive":
            positive |= same
        return positive, ~(positive | same)


def priority_bits(dtype: torch.dtype, negatives: Negatives) -> int:
    """How many bits priorities have, 32 or 64."""
    return 64 if dtype == torch.float64 and negatives.keep != "random" else 32


def least_kept(count: Callable[[int | None, int], torch.Tensor], bits: int, wanted: int) -> int:
    """Find the priority from which on `wanted` negatives of the global batch are kept, 16 bits of it at a time.

    Args:
        count: given `prefix` and `shift`, counts the negatives of the global batch whose priority >> (shift + 16) is
            the prefix (all, if None) by `digit` of their priority at `shift`, (2^16,) int64.
        bits: of a priority.
        wanted: how many to keep; all of them if there are fewer.
    """
    if wanted == 0:
        return 2**63 - 1
    prefix = None
    for shift in range(bits - 16, -1, -16):
        counts = count(prefix, shift)
        at_least = counts.flip(0).cumsum(0)
        if wanted >= int(at_least[-1]):
            return -(2 ** (bits - 1)) if prefix is None else prefix << (shift + 16)
        place = int(torch.searchsorted(at_least, wanted))
        found = len(counts) - 1 - place
        wanted -= int(at_least[place] - counts[found])
        prefix = found - _BINS // 2 if prefix is None else prefix * _BINS + found
    assert prefix is not None
    return prefix


def count_digits(priority: torch.Tensor, bits: int, prefix: int | None, shift: int) -> torch.Tensor:
    """Count (k,) priorities that begin with `prefix` by their 16 bits at `shift`, (2^16,) int64, in ascending order."""
    if prefix is not None:
        priority = priority[priority >> (shift + 16) == prefix]
    digit = (priority >> shift) & (_BINS - 1)
    if shift == bits - 16:
        digit ^= _BINS // 2  # the sign's bit: negative priorities come first
    return torch.bincount(digit, minlength=_BINS)


def _hash(numbers: torch.Tensor) -> torch.Tensor:
    """Scatter int64 numbers over the 32-bit integers (the finaliser of MurmurHash3, twice as wide)."""
    for _ in range(2):
        numbers = (numbers ^ ((numbers >> 33) & 0x7FFFFFFF)) * -0xAE502812AA7333
    return (numbers ^ ((numbers >> 33) & 0x7FFFFFFF)) >> 32
