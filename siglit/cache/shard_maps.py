"""The shards of a cache as memory-mapped arrays, and rows gathered from all of them at once.

Maps a shard when something of it is first needed. Knows nothing of HDF5, keys or captions: an array is found by the
offsets in index.json.
Shapes: N rows of the cache, D embedding width, k requested rows.
"""

import errno
import math
import mmap
import os
import resource
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from siglit.cache.checking import REMAKE_INDEX, REMAKE_SHARD
from siglit.cache.format import DATASETS, INDEX_NAME, CacheError, ShardRecord, outside_datasets
from siglit.runtime.bus_errors import explain_bus_errors

_in_use: "weakref.WeakSet[ShardMaps]" = weakref.WeakSet()
_MAX_STEPS = 3
"""Shards that a bucket of rows may reach over before a binary search is faster."""


class ShardMaps:
    """The datasets of all shards. May be pickled and forked at any time: it carries where files are, not their maps."""

    def __init__(self, path: Path, folder: Path, shards: Sequence[ShardRecord], dim: int, starts: np.ndarray) -> None:
        """Take what index.json says; no file is opened.

        Args:
            path: the cache, as named in messages.
            folder: the absolute folder that the shards' file names start from.
            shards: what index.json says of every shard.
            dim: D.
            starts: (shards + 1,) int64, number of each shard's first row, then N.
        """
        self._path, self._folder, self._shards, self._dim, self._starts = path, folder, shards, dim, starts
        self._maps: dict[int, mmap.mmap] = {}
        self._mapped: dict[int, os.stat_result] = {}

    def __getstate__(self) -> dict[str, Any]:
        lazy = ("_maps", "_mapped", "_window", "_buckets")
        return {**{name: value for name, value in vars(self).items() if name not in lazy}, "_maps": {}, "_mapped": {}}

    def array(self, shard: int, name: str) -> np.ndarray:
        """A dataset of a shard, mapped and read-only.

        Raises:
            CacheError: the shard is missing or not the one in the index.
        """
        offset, *shape = self._shards[shard].datasets[name]
        if offset is None:
            return np.zeros(shape, DATASETS[name])
        return np.ndarray(shape, DATASETS[name], self._map(shard), offset)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Copy (k,) int64 rows in [0, N), k ≥ 1, as (k, D) float16.

        Raises:
            CacheError: a shard is missing or not the one in the index.
        """
        if len(self._shards) == 1:
            return np.take(self.array(0, "embedding"), rows, axis=0)
        window, first, stride = self._window
        return window[first[self._shards_of(rows)] + rows * stride].view(DATASETS["embedding"]).reshape(-1, self._dim)

    def written_since(self) -> dict[int, os.stat_result]:
        """{number: status} of the shards whose files were written to since they were mapped or accepted.

        Their maps show other bytes now. A file that was replaced or deleted is not one of them, as its map shows the
        bytes that were mapped.
        """
        now = {shard: self._status(shard) for shard in self._mapped}
        return {s: status for s, status in now.items() if status and _is_written(self._mapped[s], status)}

    def accept(self, shard: int, status: os.stat_result) -> None:
        """Take a shard that `written_since` has returned for unchanged, as where only its times were set."""
        self._mapped[shard] = status

    def _status(self, shard: int) -> os.stat_result | None:
        try:
            return os.stat(self._folder / self._shards[shard].file)
        except OSError:
            return None

    def _shards_of(self, rows: np.ndarray) -> np.ndarray:
        """(k,) shard of each row: looked up for the row's bucket, then corrected by up to `_MAX_STEPS` shards.

        A binary search per row, whose branches the processor cannot predict, took a tenth of the time of `gather`.
        """
        shift, shard_of_bucket, steps = self._buckets
        if steps > _MAX_STEPS:  # shards of very different sizes
            return np.searchsorted(self._starts, rows, side="right") - 1
        shards = shard_of_bucket[rows >> shift]
        for _ in range(steps):
            shards += rows >= self._starts[shards + 1]
        return shards

    @cached_property
    def _buckets(self) -> tuple[int, np.ndarray, int]:
        """About as many buckets of 2^shift rows as shards.

        Returns:
            shift; (buckets,) shard of each bucket's first row; how many shards further its last row may be.
        """
        count = int(self._starts[-1])
        shift = max(0, (count // len(self._shards)).bit_length() - 1)
        first = np.arange(0, count, 1 << shift)
        last = np.minimum(first + (1 << shift), count) - 1
        shards = np.searchsorted(self._starts, np.stack([first, last]), side="right") - 1
        return shift, shards[0], int((shards[1] - shards[0]).max())

    @cached_property
    def _window(self) -> tuple[np.ndarray, np.ndarray, int]:
        """All shards as one array, so that a batch is one fancy index whatever the number of shards.

        The array covers the addresses from the lowest map to the highest, in steps so small that every row begins on
        one. Memory between the maps is never touched, as the array is only ever indexed with rows: never copy, print
        or reduce it. A `take` from each shard in turn reached 0.8 of the speed of one array with 64 shards of
        8192 × 768, and its cost grows with the number of shards.

        Returns:
            (steps,) rows as opaque items of 2 D bytes; (shards,) index that row 0 would have if the shard extended to
            the left as far as it; the number of steps from a row to the next one.
        """
        row_type = np.dtype((np.void, self._dim * DATASETS["embedding"].itemsize))
        views = [self.array(shard, "embedding") for shard in range(len(self._shards))]
        filled = {shard: view.view(row_type)[:, 0] for shard, view in enumerate(views) if len(view) > 0}
        address = {shard: view.ctypes.data for shard, view in filled.items()}
        lowest = min(address, key=lambda shard: address[shard])
        step = math.gcd(row_type.itemsize, *(place - address[lowest] for place in address.values()))
        last = max(address[shard] + (len(view) - 1) * row_type.itemsize for shard, view in filled.items())
        length = (last - address[lowest]) // step + 1
        window = np.lib.stride_tricks.as_strided(filled[lowest], (length,), (step,), writeable=False)
        stride = row_type.itemsize // step
        first = np.zeros(len(self._shards), np.int64)
        for shard, place in address.items():
            first[shard] = (place - address[lowest]) // step - self._starts[shard] * stride
        return window, first, stride

    def _map(self, shard: int) -> mmap.mmap:
        if shard in self._maps:
            return self._maps[shard]
        if len(self._maps) == 0:
            _allow_open_files(len(self._shards))
            explain_bus_errors(_cut_off)
            _in_use.add(self)
        record = self._shards[shard]
        try:
            with open(self._folder / record.file, "rb") as file:
                status = os.fstat(file.fileno())
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            advice = "raise `ulimit -n`" if getattr(error, "errno", None) == errno.EMFILE else REMAKE_SHARD
            raise CacheError(f"{self._path / record.file} cannot be mapped ({error}); {advice}") from None
        # Reading a map beyond the end of its file kills the process.
        if len(mapped) != record.size:
            raise CacheError(
                f"{self._path / record.file} has {len(mapped)} bytes, but had {record.size} when the cache was "
                f"completed; {REMAKE_SHARD}"
            )
        for name in DATASETS:
            offset, *shape = record.datasets[name]
            end = 0 if offset is None else offset + math.prod(shape) * DATASETS[name].itemsize
            if not 0 <= end <= record.size:
                raise CacheError(
                    f"{self._path / INDEX_NAME} is damaged (it places {name} of {record.file} outside the file); "
                    f"{REMAKE_INDEX}"
                )
        self._check_identity(record, mapped)
        self._maps[shard], self._mapped[shard] = mapped, status
        return mapped

    def cut_off(self) -> str:
        """Message about the first mapped shard that is shorter than it was; "" if there is none."""
        for shard in self.written_since():
            path, size = self._path / self._shards[shard].file, self._shards[shard].size
            actual = (self._folder / self._shards[shard].file).stat().st_size
            if actual < size:
                return f"{path} was cut off from {size} to {actual} bytes while it was in use; {REMAKE_SHARD}"
        return ""

    def _check_identity(self, record: ShardRecord, mapped: mmap.mmap) -> None:
        """Refuse a shard of another cache, which may have the same size: it does not carry the index's checksum.

        The writer puts the attributes before the first dataset, so the search ends within three pages (9 kB). Whether
        the data has that checksum is for `verify`.
        """
        carried = record.checksum.encode()
        first = min(offset for offset, *_ in record.datasets.values() if offset is not None)
        if mapped.find(carried, 0, first) >= 0:
            return
        if not any(mapped.find(carried, *gap) >= 0 for gap in outside_datasets(record)):
            raise CacheError(
                f"{self._path / record.file} is not the shard that {INDEX_NAME} names: it does not carry the checksum "
                f"{record.checksum[:12]}…; restore the right file, or {REMAKE_SHARD}"
            )


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files by `count`, one per map, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + count, hard), hard))


def _cut_off() -> str:
    return next(filter(None, (maps.cut_off() for maps in _in_use)), "")


def _is_written(before: os.stat_result, now: os.stat_result) -> bool:
    return os.path.samestat(now, before) and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns)
