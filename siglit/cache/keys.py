"""Whether a key stands for two images: over all shards of a cache, or in the next shard before it is committed.

Holds 64-bit hashes and compares keys as text only where hashes meet. Knows nothing of embeddings.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from siglit.cache.format import CacheError, open_shard, pack_strings, shard_files, shard_name, unpack_strings


class Duplicate(NamedTuple):
    """One key in two places, each the number of a part and the position in it."""

    key: str
    first: tuple[int, int]
    second: tuple[int, int]


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """(k,) uint64, a hash of each of k keys.

    Raises:
        CacheError: as `pack_strings`.
    """
    try:
        digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    except (AttributeError, UnicodeEncodeError):
        pack_strings(keys, "key")  # names the one
        raise
    return np.frombuffer(digests, np.uint64)


def find_duplicate(hashes: Sequence[np.ndarray], keys_of: Callable[[int], Sequence[str]]) -> Duplicate | None:
    """Look for a key that occurs twice in several parts.

    Holds another 8 bytes per key; 100 million keys are 1.6 GB with their hashes.

    Args:
        hashes: `hash_keys` of every part.
        keys_of: the keys of part i; called only for parts in which a hash is one of two.
    """
    joined = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
    joined.sort()
    met = np.unique(joined[1:][joined[1:] == joined[:-1]])
    seen: dict[str, tuple[int, int]] = {}
    for part, own in enumerate(hashes if met.size else ()):
        rows = np.flatnonzero(np.isin(own, met)).tolist()
        keys = keys_of(part) if rows else ()
        for row in rows:
            if keys[row] in seen:
                return Duplicate(keys[row], seen[keys[row]], (part, row))
            seen[keys[row]] = part, row
    return None


def find_duplicate_key(paths: Sequence[Path]) -> str | None:
    """Look for a key that two rows of a cache share; as `find_duplicate`.

    Args:
        paths: all its shards, readable.

    Returns:
        A text that names the key, both shards and both rows; None if all keys differ.
    """
    found = find_duplicate([hash_keys(shard_keys(path)) for path in paths], lambda part: shard_keys(paths[part]))
    if found is None:
        return None
    (a, row), (b, other) = found.first, found.second
    return f"key {found.key!r} is in row {row} of {paths[a].name} and in row {other} of {paths[b].name}"


def shard_keys(path: Path) -> list[str]:
    """The keys of a committed shard, one per row."""
    with open_shard(path) as file:
        return list(unpack_strings(file["key_bytes"][()], file["key_offsets"][()]))


class KnownKeys:
    """The keys of the shards of an unfinished cache, to compare the next shard with before it is committed.

    Holds 8 bytes per key, 16 for moments. Reads the keys of shards that other processes commit, each once. Two
    processes that commit at one moment do not see each other's shard; `finish` compares all.
    """

    def __init__(self, folder: Path) -> None:
        """Take the cache's folder; nothing is read before the first `add`."""
        self._folder = Path(folder)
        self._shards: set[int] = set()
        self._runs: list[np.ndarray] = []

    def add(self, number: int, keys: Sequence[str]) -> None:
        """Compare the keys of shard `number`, which is to be committed next, and remember them.

        Raises:
            CacheError: another shard has one of them; the text names the key, both shards and both rows.
        """
        for other, path in shard_files(self._folder).items():
            if other not in self._shards and other != number:
                self._remember(other, hash_keys(shard_keys(path)))
        hashes = hash_keys(keys)
        met = np.zeros(len(hashes), bool)
        for run in self._runs:
            met |= run[np.minimum(np.searchsorted(run, hashes), len(run) - 1)] == hashes
        if met.any():
            self._compare(number, {keys[row]: row for row in np.flatnonzero(met).tolist()})
        self._remember(number, hashes)

    def _remember(self, number: int, hashes: np.ndarray) -> None:
        self._shards.add(number)
        if not len(hashes):
            return
        # Sorted runs, each longer than the next: a key is sorted again as often as the total doubles, not per shard.
        run = np.sort(hashes)
        while self._runs and len(self._runs[-1]) <= len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort()
        self._runs.append(run)

    def _compare(self, number: int, rows: dict[str, int]) -> None:
        for other, path in shard_files(self._folder).items():
            for row, key in enumerate(shard_keys(path) if other != number else ()):
                if key in rows:
                    raise CacheError(
                        f"{self._folder}: key {key!r} is in row {row} of {path.name} and in row {rows[key]} of "
                        f"{shard_name(number)}, but a key names one image; make the keys of the source unique, delete "
                        f"{path.name} and run `siglit precompute` again"
                    )
