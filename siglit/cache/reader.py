"""Read a complete cache: rows by number in any order, with their keys, captions, labels and languages.

Opening reads index.json alone; `shard_maps.py` maps the shards when something of them is needed, and only `verify` uses
h5py. Writes nothing; knows nothing of batches or torch.
Shapes: N rows of the cache, D embedding width, M captions of the cache.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from typing_extensions import override

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
    shard_files,
    shard_problems,
    unpack_strings,
)
from siglit.cache.shard_maps import ShardMaps
from siglit.runtime.text import first_line, json_problem, plural

_ABSENT = object()


class EmbeddingCache:
    """A complete cache. May be pickled and forked at any time: it carries where files are, not their maps.

    Attributes:
        path: the folder, as given.
        dim: D.
        fingerprint: the settings that the embeddings were computed with.
        num_captions: M.
        num_skipped: number of images that have no row.
        created_by: versions of the software that wrote the shards; empty where an earlier siglit completed the cache.

    Raises:
        CacheError: the folder holds no cache, or one that is not complete, damaged, or of a newer format version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        # A process that unpickles this object may have another working directory.
        self._folder = self.path.absolute()
        index = _read_index(self.path)
        try:
            shards = [ShardRecord(**shard) for shard in index["shards"]]
            elsewhere = next((shard.file for shard in shards if "/" in shard.file), None)
            if elsewhere is not None:
                raise ValueError(f"it names a shard outside its folder, {elsewhere}")
            self._set_shards(shards, index["dim"], index["fingerprint"])
            self.num_skipped = index["skipped"]
            self.created_by = index.get("created_by", [])
            self._metadata_checksums = index.get("metadata_checksums")
            totals = index["rows"], index["captions"]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CacheError(f"{self.path / INDEX_NAME} is damaged ({first_line(error)}); {REMAKE_INDEX}") from None
        outside = self._metadata_checksums
        if (len(self), self.num_captions) != totals or (outside is not None and len(outside) != len(self._shards)):
            raise CacheError(
                f"{self.path / INDEX_NAME} is damaged (its totals are not the sums over its shards); {REMAKE_INDEX}"
            )
        offsets = (shard.datasets[name][0] for shard in self._shards for name in DATASETS)
        if any(offset is not None and offset % ALIGNMENT for offset in offsets):
            raise CacheError(
                f"{self.path / INDEX_NAME} is damaged, or not siglit's (a dataset does not begin on a multiple of "
                f"{ALIGNMENT} bytes); {REMAKE_INDEX}"
            )

    def _set_shards(self, shards: list[ShardRecord], dim: int, fingerprint: dict[str, Any]) -> None:
        """Number rows and captions through `shards`, whose file names are relative to this cache's folder."""
        self._shards = shards
        self.dim = dim
        self.fingerprint = fingerprint
        self._starts = _starts([shard.rows for shard in shards])
        self._caption_starts = _starts([shard.captions for shard in shards])
        self.num_captions = int(self._caption_starts[-1])
        self.num_skipped = sum(shard.skipped for shard in shards)
        if not isinstance(fingerprint, dict):
            raise TypeError("its fingerprint is not an object")
        for shard in shards:
            if not all(_is_place(shard.datasets.get(name)) for name in DATASETS):
                raise KeyError(f"datasets of {shard.file}")
        self._maps = ShardMaps(self.path, self._folder, shards, dim, self._starts)

    def located_shards(self) -> list[ShardRecord]:
        """What is needed to map every shard from anywhere: its record, with `file` as an absolute path."""
        return [replace(shard, file=str(self._folder / shard.file)) for shard in self._shards]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"EmbeddingCache({str(self.path)!r}: {len(self)} × {self.dim}, {self.num_captions} captions)"

    def __getstate__(self) -> dict[str, Any]:
        lazy = ("caption_offsets", "caption_rows", "labels", "langs", "skipped")
        return {name: value for name, value in vars(self).items() if name not in lazy}

    @property
    def digest(self) -> str:
        """32 hexadecimal digits over all stored data in order; part of the names of files derived from this cache."""
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
        """Copy rows, from whichever shards they are in.

        Args:
            rows: (k,) integers in [0, N), in any order, repeated or not.

        Returns:
            (k, D) float16, the tower's outputs, not normalized.

        Raises:
            IndexError: a row is not in [0, N), or `rows` is not a list of integers.
            CacheError: a shard is missing or not the one in the index.
        """
        rows = np.asarray(rows)
        if rows.ndim != 1 or (rows.dtype.kind not in "iu" and rows.size):
            raise IndexError(f"rows are {rows.dtype} {rows.shape}, expected integers (k,)")
        if rows.size == 0:
            return np.empty((0, self.dim), DATASETS["embedding"])
        for extreme in (int(rows.min()), int(rows.max())):
            self._check(extreme, len(self), "row")
        return self._maps.gather(rows.astype(np.int64, copy=False))

    @property
    def keys(self) -> "Keys":
        """The keys of all rows, (N,), each decoded on access."""
        return Keys(self)

    def key(self, row: int) -> str:
        """Key of a row.

        Raises:
            IndexError: `row` is not in [0, N).
        """
        shard, local = self._locate(self._starts, row, "row")
        return self._text(shard, "key", local)

    @cached_property
    def caption_offsets(self) -> np.ndarray:
        """(N + 1,) int64: the captions of row r are numbers caption_offsets[r] … caption_offsets[r + 1] − 1."""
        parts = [self._maps.array(shard, "caption_ptr")[1:] for shard in range(len(self._shards))]
        counted = [part + start for part, start in zip(parts, self._caption_starts[:-1], strict=True)]
        return np.concatenate([np.zeros(1, np.int64), *counted])

    @cached_property
    def caption_rows(self) -> np.ndarray:
        """(M,) int64: the row that each caption belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.caption_offsets))

    def captions(self, row: int) -> list[str]:
        """All captions of a row, in order.

        Raises:
            IndexError: `row` is not in [0, N).
        """
        shard, local = self._locate(self._starts, row, "row")
        start, end = self._maps.array(shard, "caption_ptr")[local : local + 2].tolist()
        return [self._text(shard, "caption", number) for number in range(start, end)]

    def caption(self, number: int) -> str:
        """One caption by its number.

        Raises:
            IndexError: `number` is not in [0, M).
        """
        shard, local = self._locate(self._caption_starts, number, "caption")
        return self._text(shard, "caption", local)

    def iter_captions(self) -> Iterator[str]:
        """All captions in order, 0 … M − 1, with one shard in memory at a time."""
        return self._iter_texts("caption")

    @cached_property
    def labels(self) -> np.ndarray | None:
        """(N,) int64 class numbers, −1 where a row has none; None if no row has one."""
        if not any(shard.labelled for shard in self._shards):
            return None
        return np.concatenate([self._maps.array(shard, "label") for shard in range(len(self._shards))])

    @cached_property
    def langs(self) -> np.ndarray | None:
        """(M,) language codes as text, "" where a caption has none; None if no caption has one."""
        if not any(shard.with_lang for shard in self._shards):
            return None
        tables = [np.array(list(self._texts(shard, "lang")), np.str_) for shard in range(len(self._shards))]
        return np.concatenate([table[self._maps.array(shard, "lang_code")] for shard, table in enumerate(tables)])

    @cached_property
    def skipped(self) -> list[tuple[str, str]]:
        """(key, reason) of every image that has no row."""
        keys, reasons = self._iter_texts("skipped_key"), self._iter_texts("skipped_reason")
        return list(zip(keys, reasons, strict=True))

    def check_fingerprint(self, expected: Mapping[str, Any], fields: Sequence[str] | None = None) -> None:
        """Check that this cache was made with the expected settings.

        Args:
            expected: the expected fingerprint.
            fields: compare only these, dotted where nested ("image_tower.model"); None: all.

        Raises:
            CacheError: the fingerprints differ; the message names the fields, with both values.
        """
        actual: Mapping[str, Any] = self.fingerprint
        if fields is not None:
            actual, expected = _select(actual, fields), _select(expected, fields)
        differences = differing_fields(actual, expected)
        if len(differences) > 0:
            raise CacheError(
                f"{self.path} was made with other settings, as its {INDEX_NAME} says: {'; '.join(differences)}. "
                f"Change the configuration back, or run `siglit precompute` into another folder"
            )

    def check_unchanged(self) -> None:
        """Check that the shards that this process reads still have the bytes they had when it began to read them.

        A shard is read again only if its file was written to meanwhile.

        Raises:
            CacheError: a shard was damaged or overwritten while it was in use.
        """
        for number, status in self._maps.written_since().items():
            shard = self._shards[number]
            problems = shard_problems(self._folder / shard.file, number, shard, self.fingerprint, None)
            if len(problems) > 0:
                raise CacheError(
                    f"{self.path / shard.file} was written to while it was in use: {problems[0]}; {REMAKE_SHARD}"
                )
            self._maps.accept(number, status)

    def verify(self) -> list[str]:
        """Read the whole cache and check it: checksums, counts, offsets, settings, keys, texts, finite values.

        Returns:
            One message per problem, with the file and what to do; empty if the cache is sound.
        """
        return [problem.text for problem in self.find_problems()]

    def find_problems(self) -> list[Problem]:
        """The problems that `verify` reports, with the shards to make again."""
        indexed = self._shards, self.fingerprint, self.num_skipped, self._metadata_checksums, self.created_by
        return find_problems(self.path, *indexed)

    def _locate(self, starts: np.ndarray, number: int, what: str) -> tuple[int, int]:
        self._check(number, int(starts[-1]), what)
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        return shard, int(number - starts[shard])

    def _check(self, number: int, count: int, what: str) -> None:
        if not 0 <= number < count:
            raise IndexError(f"{what} {number} is out of range: {self.path} has {plural(count, what)}, numbered from 0")

    def _text(self, shard: int, name: str, number: int) -> str:
        start, end = self._maps.array(shard, f"{name}_offsets")[number : number + 2]
        return self._maps.array(shard, f"{name}_bytes")[start:end].tobytes().decode()

    def _texts(self, shard: int, name: str) -> Iterator[str]:
        return unpack_strings(self._maps.array(shard, f"{name}_bytes"), self._maps.array(shard, f"{name}_offsets"))

    def _iter_texts(self, name: str) -> Iterator[str]:
        for shard in range(len(self._shards)):
            yield from self._texts(shard, name)


class Keys(Sequence[str]):
    """The keys of a cache as a sequence; reads each from its shard and holds none."""

    def __init__(self, cache: EmbeddingCache) -> None:
        self._cache = cache

    @override
    def __len__(self) -> int:
        return len(self._cache)

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> list[str]: ...
    @override
    def __getitem__(self, item: int | slice) -> str | list[str]:
        if isinstance(item, slice):
            return [self._cache.key(row) for row in range(*item.indices(len(self)))]
        return self._cache.key(item + len(self) if item < 0 else item)

    @override
    def __iter__(self) -> Iterator[str]:
        return self._cache._iter_texts("key")


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CacheError(no_cache(path))
    file = path / INDEX_NAME
    if not file.is_file():
        count = plural(len(shard_files(path)), "shard")
        raise CacheError(f"{path} is not complete: it has {count}, but no {INDEX_NAME}; {REMAKE}")
    try:
        index = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{file} is damaged, not JSON ({json_problem(error)}); {REMAKE_INDEX}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT_NAME or not isinstance(index.get("version"), int):
        raise CacheError(f"{file} is not the index of a cache; check the path, or {REMAKE_INDEX}")
    if index["version"] > FORMAT_VERSION:
        raise CacheError(
            f"{path} has format version {index['version']}, this siglit reads up to {FORMAT_VERSION}; update siglit"
        )
    return index


def _is_place(place: object) -> bool:
    """Whether an index says where a dataset is: [offset or None, *shape]."""
    if not isinstance(place, list) or not 2 <= len(place) <= 3:
        return False
    return all(type(n) is int and n >= 0 for n in (place[1:] if place[0] is None else place))


def _starts(counts: Sequence[int]) -> np.ndarray:
    """(shards + 1,) int64: number of the first item of each shard, then the total."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(counts, np.int64))])


def _select(fingerprint: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """{dotted field: value} of the fields that the fingerprint has."""
    selected: dict[str, Any] = {}
    for field in fields:
        value: Any = fingerprint
        for name in field.split("."):
            value = value[name] if isinstance(value, Mapping) and name in value else _ABSENT
        if value is not _ABSENT:
            selected[field] = value
    return selected
