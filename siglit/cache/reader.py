"""Read a complete cache: rows by number in any order, with their keys, captions, labels and languages.

Opens nothing but index.json until something is asked for, then maps the shards; h5py is used by `verify` alone. Writes
nothing; knows nothing of batches or torch.
Shapes: N rows of the cache, D embedding width, M captions of the cache.
"""

import errno
import hashlib
import json
import math
import mmap
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from siglit.cache.checking import REMAKE, REMAKE_INDEX, REMAKE_SHARD, Problem, find_problems, no_cache
from siglit.cache.format import (
    ALIGNMENT,
    DATASETS,
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    CacheError,
    ShardRecord,
    differing_fields,
    outside_datasets,
    shard_files,
    unpack_strings,
)


class EmbeddingCache:
    """A complete cache. May be pickled and forked at any time: it carries where things are, not its maps.

    Attributes:
        path: the folder, as given.
        dim: D.
        fingerprint: what made it.
        num_captions: M.
        num_skipped: images that have no row.
        created_by: versions of the software that made its shards; empty where the cache was completed by an earlier
            siglit.

    Raises:
        CacheError: there is no cache, it is not complete, damaged, or of a newer format version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        # A process that gets this object may work in another folder.
        self._folder = self.path.absolute()
        index = _read_index(self.path)
        try:
            self._take([ShardRecord(**shard) for shard in index["shards"]], index["dim"], index["fingerprint"])
            self.num_skipped = index["skipped"]
            self.created_by = index.get("created_by", [])
            self._metadata_checksums = index.get("metadata_checksums")
            totals = index["rows"], index["captions"]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CacheError(f"{self.path / INDEX_NAME} is damaged ({error!r}); {REMAKE_INDEX}") from None
        outside = self._metadata_checksums
        if (len(self), self.num_captions) != totals or (outside is not None and len(outside) != len(self._shards)):
            raise CacheError(f"{self.path / INDEX_NAME} is damaged (its totals are not its shards'); {REMAKE_INDEX}")
        offsets = (shard.datasets[name][0] for shard in self._shards for name in DATASETS)
        if any(offset is not None and offset % ALIGNMENT for offset in offsets):
            raise CacheError(
                f"{self.path} has data off the {ALIGNMENT}-byte grid; it was not made by siglit: remake it"
            )

    def _take(self, shards: list[ShardRecord], dim: int, fingerprint: dict[str, Any]) -> None:
        """Number rows and captions through `shards`, whose files are named from this cache's folder on."""
        self._shards = shards
        self.dim = dim
        self.fingerprint = fingerprint
        self._starts = _starts([shard.rows for shard in shards])
        self._caption_starts = _starts([shard.captions for shard in shards])
        self.num_captions = int(self._caption_starts[-1])
        self.num_skipped = sum(shard.skipped for shard in shards)
        for shard in shards:
            if not shard.datasets.keys() >= DATASETS.keys() or not all(shard.datasets.values()):
                raise KeyError(f"datasets of {shard.file}")
        self._maps: dict[int, mmap.mmap] = {}

    def located_shards(self) -> list[ShardRecord]:
        """What is needed to map every shard from anywhere: its record, with the whole path for the file's name."""
        return [replace(shard, file=str(self._folder / shard.file)) for shard in self._shards]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"EmbeddingCache({str(self.path)!r}: {len(self)} × {self.dim}, {self.num_captions} captions)"

    def __getstate__(self) -> dict[str, Any]:
        lazy = ("_maps", "_window", "_buckets", "caption_offsets", "caption_rows", "labels", "langs", "skipped")
        return {**{name: value for name, value in vars(self).items() if name not in lazy}, "_maps": {}}

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that depend on all stored data and its order; names files derived from this cache."""
        return hashlib.sha256("\n".join(shard.checksum for shard in self._shards).encode()).hexdigest()[:32]

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self._shards)

    @property
    def shard_paths(self) -> list[Path]:
        """The files of the shards, in order."""
        return [self._folder / shard.file for shard in self._shards]

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Copy rows out of the cache, whichever shards they are in.

        Args:
            rows: (k,) integers in [0, N), in any order, repeated or not.

        Returns:
            (k, D) float16, the tower's outputs, not normalised.

        Raises:
            IndexError: a row is negative or not there, or `rows` is not a list of integers.
            CacheError: a shard is missing or not the one that the index was made of.
        """
        rows = np.asarray(rows)
        if rows.ndim != 1 or (rows.dtype.kind not in "iu" and rows.size):
            raise IndexError(f"rows are {rows.dtype} {rows.shape}, integers (k,) were wanted")
        if rows.size == 0:
            return np.empty((0, self.dim), DATASETS["embedding"])
        for extreme in (int(rows.min()), int(rows.max())):
            self._check(extreme, len(self), "row")
        rows = rows.astype(np.int64, copy=False)
        if len(self._shards) == 1:
            return np.take(self._array(0, "embedding"), rows, axis=0)
        window, first, stride = self._window
        return window[first[self._shards_of(rows)] + rows * stride].view(DATASETS["embedding"]).reshape(-1, self.dim)

    @property
    def keys(self) -> "Keys":
        """The keys of all rows, (N,), decoded when asked for."""
        return Keys(self)

    def key(self, row: int) -> str:
        """Key of a row. Raises IndexError if it is not in [0, N)."""
        shard, local = self._locate(self._starts, row, "row")
        return self._text(shard, "key", local)

    @cached_property
    def caption_offsets(self) -> np.ndarray:
        """(N + 1,) int64: the captions of row r are numbers caption_offsets[r] … caption_offsets[r + 1] − 1."""
        parts = [self._array(shard, "caption_ptr")[1:] for shard in range(len(self._shards))]
        counted = [part + start for part, start in zip(parts, self._caption_starts[:-1], strict=True)]
        return np.concatenate([np.zeros(1, np.int64), *counted])

    @cached_property
    def caption_rows(self) -> np.ndarray:
        """(M,) int64: the row that each caption belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.caption_offsets))

    def captions(self, row: int) -> list[str]:
        """All captions of a row, in order. Raises IndexError if it is not in [0, N)."""
        shard, local = self._locate(self._starts, row, "row")
        start, end = self._array(shard, "caption_ptr")[local : local + 2].tolist()
        return [self._text(shard, "caption", number) for number in range(start, end)]

    def caption(self, number: int) -> str:
        """One caption by its number. Raises IndexError if it is not in [0, M)."""
        shard, local = self._locate(self._caption_starts, number, "caption")
        return self._text(shard, "caption", local)

    def iter_captions(self) -> Iterator[str]:
        """All captions in order, 0 … M − 1, a shard in memory at a time."""
        return self._iter_texts("caption")

    @cached_property
    def labels(self) -> np.ndarray | None:
        """(N,) int64 class numbers, −1 where a row has none; None if no row has one."""
        if not any(shard.labelled for shard in self._shards):
            return None
        return np.concatenate([self._array(shard, "label") for shard in range(len(self._shards))])

    @cached_property
    def langs(self) -> np.ndarray | None:
        """(M,) language codes as text, "" where a caption has none; None if no caption has one."""
        if not any(shard.with_lang for shard in self._shards):
            return None
        tables = [np.array(list(self._texts(shard, "lang")), np.str_) for shard in range(len(self._shards))]
        return np.concatenate([table[self._array(shard, "lang_code")] for shard, table in enumerate(tables)])

    @cached_property
    def skipped(self) -> list[tuple[str, str]]:
        """(key, reason) of every image that has no row."""
        keys, reasons = self._iter_texts("skipped_key"), self._iter_texts("skipped_reason")
        return list(zip(keys, reasons, strict=True))

    def check_fingerprint(self, expected: Mapping[str, Any], fields: Sequence[str] | None = None) -> None:
        """Make sure that this cache is the one that was asked for.

        Args:
            expected: the fingerprint asked for.
            fields: compare only these, dotted where nested ("image_tower.model"); all if None.

        Raises:
            CacheError: they differ; the text names the fields, with both values.
        """
        here: Mapping[str, Any] = self.fingerprint
        if fields is not None:
            here, expected = _select(here, fields), _select(expected, fields)
        differences = differing_fields(here, expected)
        if differences:
            raise CacheError(
                f"{self.path} was made with other settings: {'; '.join(differences)}. "
                f"Run `siglit precompute` into another folder, or change the configuration"
            )

    def verify(self) -> list[str]:
        """Read everything again and compare: checksums, counts, places, settings, keys, texts, finite values.

        Returns:
            One text per problem, with the file and what to do; empty if the cache is sound.
        """
        return [problem.text for problem in self.find_problems()]

    def find_problems(self) -> list[Problem]:
        """What `verify` finds, with the shards that are at fault."""
        return find_problems(self.path, self._shards, self.fingerprint, self.num_skipped, self._metadata_checksums)

    def _shards_of(self, rows: np.ndarray) -> np.ndarray:
        """(k,) shard of each of k rows: looked up for a bucket of rows, then moved on by a step or two.

        A binary search for each row, whose branches nobody can predict, took a tenth of the time of `gather`.
        """
        shift, shard_of_bucket, steps = self._buckets
        if steps > 3:  # shards of very different sizes
            return np.searchsorted(self._starts, rows, side="right") - 1
        shards = shard_of_bucket[rows >> shift]
        for _ in range(steps):
            shards += rows >= self._starts[shards + 1]
        return shards

    @cached_property
    def _buckets(self) -> tuple[int, np.ndarray, int]:
        """Buckets of 2^shift rows, about as many as shards: shift, shard of each bucket's first row, most steps on."""
        shift = max(0, (len(self) // len(self._shards)).bit_length() - 1)
        first = np.arange(0, len(self), 1 << shift)
        last = np.minimum(first + (1 << shift), len(self)) - 1
        shards = np.searchsorted(self._starts, np.stack([first, last]), side="right") - 1
        return shift, shards[0], int((shards[1] - shards[0]).max())

    @cached_property
    def _window(self) -> tuple[np.ndarray, np.ndarray, int]:
        """All shards as one array, so that a batch is one fancy index however many shards it comes from.

        The array spans the addresses from the lowest map to the highest, in steps that every row begins on. What lies
        between the maps is never touched: only indices of rows are ever put in. Taking from each shard in turn reached
        0.8 of the speed of one array with 64 shards of 8192 × 768, and its cost grows with their number.

        Returns:
            (steps,) rows as opaque items of 2 D bytes; (shards,) index of row 0 if the shard went on to the left until
            there; the number of steps from a row to the next one.
        """
        row_type = np.dtype((np.void, self.dim * DATASETS["embedding"].itemsize))
        views = [self._array(shard, "embedding") for shard in range(len(self._shards))]
        filled = {shard: view.view(row_type)[:, 0] for shard, view in enumerate(views) if len(view)}
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
        if not self._maps:
            _allow_open_files(len(self._shards))
        record = self._shards[shard]
        path = self._folder / record.file
        try:
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            advice = "raise `ulimit -n`" if getattr(error, "errno", None) == errno.EMFILE else REMAKE_SHARD
            raise CacheError(f"{self.path / record.file} cannot be mapped ({error}); {advice}") from None
        # Reading a map beyond the end of its file kills the process.
        if len(mapped) != record.size:
            raise CacheError(
                f"{self.path / record.file} has {len(mapped)} bytes, {record.size} when the cache was completed; "
                f"{REMAKE_SHARD}"
            )
        self._check_identity(record, mapped)
        self._maps[shard] = mapped
        return mapped

    def _check_identity(self, record: ShardRecord, mapped: mmap.mmap) -> None:
        """Refuse a shard of another cache, which may be as large: the checksum that it carries is not the index's.

        The writer puts the attributes before the first dataset, so that the search ends within three pages (9 kB).
        Whether the data has that checksum, `verify` sees.
        """
        carried = record.checksum.encode()
        first = min(offset for offset, *_ in record.datasets.values() if offset is not None)
        if mapped.find(carried, 0, first) >= 0:
            return
        if not any(mapped.find(carried, *gap) >= 0 for gap in outside_datasets(record)):
            raise CacheError(
                f"{self.path / record.file} is not the shard that {INDEX_NAME} names: it does not carry the checksum "
                f"{record.checksum[:12]}…; put the right file there, or {REMAKE_SHARD}"
            )

    def _array(self, shard: int, name: str) -> np.ndarray:
        offset, *shape = self._shards[shard].datasets[name]
        if offset is None:
            return np.zeros(shape, DATASETS[name])
        return np.ndarray(shape, DATASETS[name], self._map(shard), offset)

    def _locate(self, starts: np.ndarray, number: int, what: str) -> tuple[int, int]:
        self._check(number, int(starts[-1]), what)
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        return shard, int(number - starts[shard])

    def _check(self, number: int, count: int, what: str) -> None:
        if not 0 <= number < count:
            raise IndexError(f"{what} {number} was asked for, {self.path} has {count}, counted from 0")

    def _text(self, shard: int, name: str, number: int) -> str:
        start, end = self._array(shard, f"{name}_offsets")[number : number + 2]
        return self._array(shard, f"{name}_bytes")[start:end].tobytes().decode()

    def _texts(self, shard: int, name: str) -> Iterator[str]:
        return unpack_strings(self._array(shard, f"{name}_bytes"), self._array(shard, f"{name}_offsets"))

    def _iter_texts(self, name: str) -> Iterator[str]:
        for shard in range(len(self._shards)):
            yield from self._texts(shard, name)


class Keys(Sequence[str]):
    """The keys of a cache as a sequence that holds none of them."""

    def __init__(self, cache: EmbeddingCache) -> None:
        self._cache = cache

    def __len__(self) -> int:
        return len(self._cache)

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> list[str]: ...
    def __getitem__(self, item: int | slice) -> str | list[str]:
        if isinstance(item, slice):
            return [self._cache.key(row) for row in range(*item.indices(len(self)))]
        return self._cache.key(item + len(self) if item < 0 else item)

    def __iter__(self) -> Iterator[str]:
        return self._cache._iter_texts("key")


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CacheError(no_cache(path))
    file = path / INDEX_NAME
    if not file.is_file():
        there = len(shard_files(path))
        raise CacheError(f"{path} is not complete: {there} shards are there, but no {INDEX_NAME}; {REMAKE}")
    try:
        index = json.loads(file.read_bytes())
    except ValueError as error:
        raise CacheError(f"{file} is damaged, not JSON ({error}); {REMAKE_INDEX}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT_NAME or not isinstance(index.get("version"), int):
        raise CacheError(f"{file} is not the index of a cache; correct the path, or {REMAKE_INDEX}")
    if index["version"] > FORMAT_VERSION:
        raise CacheError(
            f"{path} has format version {index['version']}, this siglit reads up to {FORMAT_VERSION}; update siglit"
        )
    return index


def _starts(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(counts, np.int64))])


def _allow_open_files(count: int) -> None:
    """Raise this process's limit by the descriptors that the maps will hold, as far as it may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + count, hard), hard))


def _select(fingerprint: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    selected: dict[str, Any] = {}
    for field in fields:
        value: Any = fingerprint
        for name in field.split("."):
            value = value[name] if isinstance(value, Mapping) and name in value else _ABSENT
        if value is not _ABSENT:
            selected[field] = value
    return selected


_ABSENT = object()
