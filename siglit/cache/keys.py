"""Find a key that two images share: over all shards of a cache, or in a shard before it is committed.

Holds 64-bit hashes and compares keys as text only where hashes are equal. Knows nothing of embeddings.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from siglit.cache.format import CacheError, open_shard, pack_strings, shard_files, shard_name, unpack_strings


class Duplicate(NamedTuple):
    """One key in two places; a place is the number of a part and the position in it."""

    key: str
    first: tuple[int, int]
    second: tuple[int, int]


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """(k,) uint64 hashes of k keys.

    Raises:
        CacheError: a key is not a string that UTF-8 can encode.
    """
    try:
        digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    except (AttributeError, UnicodeEncodeError):
        pack_strings(keys, "key")  # raises the CacheError that names the key
        raise
    return np.frombuffer(digests, np.uint64)


def find_duplicate(hashes: Sequence[np.ndarray], keys_of: Callable[[int], Sequence[str]]) -> Duplicate | None:
    """Find a key that occurs twice within or across parts; None if all keys differ.

    Allocates another 8 bytes per key; 100 million keys take 1.6 GB with their hashes.

    Args:
        hashes: `hash_keys` of every part.
        keys_of: returns the keys of part i; called only for parts with a repeated hash.
    """
    joined = np.concatenate(hashes) if len(hashes) > 0 else np.empty(0, np.uint64)
    joined.sort()
    repeated = np.unique(joined[1:][joined[1:] == joined[:-1]])
    seen: dict[str, tuple[int, int]] = {}
    for part, own in enumerate(hashes if repeated.size else ()):
        rows = np.flatnonzero(np.isin(own, repeated)).tolist()
        keys = keys_of(part) if len(rows) > 0 else ()
        for row in rows:
            if keys[row] in seen:
                return Duplicate(keys[row], seen[keys[row]], (part, row))
            seen[keys[row]] = part, row
    return None


def find_duplicate_key(paths: Sequence[Path]) -> str | None:
    """Find a key that two rows of a cache share.

    Args:
        paths: all shards of the cache, readable.

    Returns:
        A clause that names the key, both shards and both rows; None if all keys differ.
    """
    duplicate = find_duplicate([hash_keys(shard_keys(path)) for path in paths], lambda part: shard_keys(paths[part]))
    if duplicate is None:
        return None
    (a, row), (b, other) = duplicate.first, duplicate.second
    names = [path.name if paths[a].parent == paths[b].parent else str(path) for path in (paths[a], paths[b])]
    return f"key {duplicate.key!r} is in row {row} of {names[0]} and in row {other} of {names[1]}"


def shard_keys(path: Path) -> list[str]:
    """The keys of a committed shard, one per row."""
    with open_shard(path) as file:
        return list(unpack_strings(file["key_bytes"][()], file["key_offsets"][()]))


class KnownKeys:
    """The keys of all shards of an unfinished cache; the keys of the next shard are compared with them.

    Holds 8 bytes per key, and briefly 16. Reads the keys of shards that other processes commit, each once. Two
    processes that commit at the same time do not see each other's shard; `finish` compares all.
    """

    def __init__(self, folder: Path) -> None:
        """Remember the cache's folder; nothing is read before the first `add`."""
        self._folder = Path(folder)
        self._shards: set[int] = set()
        self._sorted_hashes: list[np.ndarray] = []

    def add(self, number: int, keys: Sequence[str]) -> None:
        """Compare the keys of shard `number`, which is committed next, with all others, and remember them.

        Raises:
            CacheError: another shard has one of the keys; the message names the key, both shards and both rows.
        """
        for other, path in shard_files(self._folder).items():
            if other not in self._shards and other != number:
                self._remember(other, hash_keys(shard_keys(path)))
        hashes = hash_keys(keys)
        known = np.zeros(len(hashes), bool)
        for run in self._sorted_hashes:
            known |= run[np.minimum(np.searchsorted(run, hashes), len(run) - 1)] == hashes
        if known.any():
            self._compare(number, {keys[row]: row for row in np.flatnonzero(known).tolist()})
        self._remember(number, hashes)

    def _remember(self, number: int, hashes: np.ndarray) -> None:
        self._shards.add(number)
        if len(hashes) == 0:
            return
        # Sorted runs, each longer than the next: a key is sorted again when the total doubles, not for every shard.
        run = np.sort(hashes)
        while len(self._sorted_hashes) > 0 and len(self._sorted_hashes[-1]) <= len(run):
            run = np.concatenate([self._sorted_hashes.pop(), run])
            run.sort()
        self._sorted_hashes.append(run)

    def _compare(self, number: int, rows: dict[str, int]) -> None:
        """Compare as text the keys whose hashes are known: {key: row in shard `number`}."""
        for other, path in shard_files(self._folder).items():
            for row, key in enumerate(shard_keys(path) if other != number else ()):
                if key in rows:
                    raise CacheError(
                        f"{self._folder}: key {key!r} is in row {row} of {path.name} and in row {rows[key]} of "
                        f"{shard_name(number)}, but keys must be unique; fix the source, delete "
                        f"{path.name} and run `siglit precompute` again"
                    )
