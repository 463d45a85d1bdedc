"""The captioned samples of a source as numbered rows, and windows of them in memory.

Knows sources and keys, not orders, pixels or batches. A *row* is a captioned sample, numbered in the source's order; a
*unit* is a range of rows that is read together.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from siglit.cache import find_duplicate, hash_keys
from siglit.data.sources.samples import Sample, Source
from siglit.errors import UserError
from siglit.runtime.progress import Meter


class SampleRow(NamedTuple):
    """A row, its sample, and rows that may replace it."""

    row: int
    sample: Sample
    replacements: list[tuple[int, Sample]]
    """Rows of the same window that may take the place of this one."""


class SampleRows:
    """The captioned samples of a source, held in memory or read unit by unit.

    Attributes:
        counts: (units,) int64, rows of each unit.
    """

    def __init__(self, source: Source, *, unit_samples: int, hold: bool, quiet: bool):
        """Count the samples of every unit, which reads listings, or the headers and texts of tars.

        Args:
            source: the samples.
            unit_samples: samples of a unit, with and without captions; a tar is one unit.
            hold: keep all samples in memory.
            quiet: show no progress.

        Raises:
            UserError: a key occurs in two units, or the source is invalid where it is read.
        """
        self._source, self._units = source, source.units(unit_samples)
        self._held: list[list[Sample]] | None = [] if hold else None
        counts, hashes = [], []
        with Meter(f"reading {source.name}", None, "captioned samples", quiet=quiet) as meter:
            for number in range(len(self._units)):
                samples = self._load(number)
                counts.append(len(samples))
                hashes.append(hash_keys([sample.key for sample in samples]))
                if self._held is not None:
                    self._held.append([sample.detached() for sample in samples])
                meter.advance(len(samples))
        self._check_unique(hashes)
        self.counts = np.array(counts, np.int64)
        self._first = np.concatenate([[0], np.cumsum(self.counts)])

    def of_unit(self, number: int) -> np.ndarray:
        """The rows of a unit, int64."""
        return np.arange(self._first[number], self._first[number + 1])

    def read(self, rows: np.ndarray) -> list[Sample]:
        """The samples of ascending rows; no image is read.

        Raises:
            UserError: a unit has another number of captioned samples than when they were counted.
        """
        result: list[Sample] = []
        if len(rows) == 0:  # a window of units without captions
            return result
        # The last of equal starts: an empty unit starts where its successor does.
        units = np.unique(np.searchsorted(self._first, rows, side="right") - 1)
        parts = np.split(rows, np.searchsorted(rows, self._first[units[1:]]))
        for number, part in zip(units.tolist(), parts, strict=True):
            samples = self._load(number) if self._held is None else self._held[number]
            if len(samples) != self.counts[number]:
                raise UserError(
                    f"{self._units[number].name} had {self.counts[number]} captioned samples when training started, "
                    f"but has {len(samples)} now. Train on data that does not change"
                )
            result += [samples[row] for row in part - self._first[number]]
        return result

    def _check_unique(self, hashes: list[np.ndarray]) -> None:
        """Refuse a key in two units: in two tars, or two parquet files of one name; opening checks listings."""
        duplicate = find_duplicate(hashes, lambda number: [sample.key for sample in self._load(number)])
        if duplicate is not None:
            units = [self._units[part].name for part, _ in (duplicate.first, duplicate.second)]
            raise UserError(
                f"{self._source.name}: the key {duplicate.key!r} occurs twice: in {units[0]} and in {units[1]}. Keys "
                "must be unique; remove one of the two, or set key_column"
            )

    def _load(self, number: int) -> list[Sample]:
        return [sample for sample in self._source.load(self._units[number]) if len(sample.captions) > 0]


class SampleWindow:
    """The samples of some rows in memory, handed out in the order of the rows."""

    def __init__(self, all_rows: SampleRows, rows: np.ndarray, replacements: np.ndarray):
        """Read the samples of `rows`, (k,) int64, and of the rows that may replace them."""
        unique, place = np.unique(np.concatenate([rows, replacements]), return_inverse=True)
        # Ascending, so that every part of a file is read once.
        self._samples = [sample.detached() for sample in all_rows.read(unique)]
        self._rows, self._place = rows, place[: len(rows)]
        self._replacements = [
            (row, self._samples[i]) for row, i in zip(replacements.tolist(), place[len(rows) :].tolist(), strict=True)
        ]

    def __iter__(self) -> Iterator[SampleRow]:
        """Yield the rows in their order."""
        for row, place in zip(self._rows, self._place, strict=True):
            yield SampleRow(int(row), self._samples[place], self._replacements)
