"""Several caches as one: copied together, or read together where they are.

Both ask for one fingerprint, but for the source, and for keys that are unique over all parts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from siglit.cache.checking import REMAKE_SHARD, Problem
from siglit.cache.format import (
    DATASETS,
    CacheError,
    content_checksum,
    differing_fields,
    open_shard,
)
from siglit.cache.keys import find_duplicate_key
from siglit.cache.lock import exclusive
from siglit.cache.reader import EmbeddingCache
from siglit.cache.writer import commit_arrays, committed_shards, finish, remove_unfinished


def merge(folder: Path, parts: Sequence[EmbeddingCache]) -> EmbeddingCache:
    """Copy the shards of complete caches into one, in order; rows keep their bytes and shards their checksums.

    The shards' numbers and fingerprints are in the files, so they are written anew and not linked; a shard is in memory
    at a time, and its checksum is compared on the way. Goes on where a killed merge of the same parts stopped.

    Args:
        folder: where the merged cache goes; not one of the parts.
        parts: at least two.

    Returns:
        The merged cache. Its fingerprint's source is {"merged": [source of every part]}.

    Raises:
        CacheError: the parts do not fit each other, share a key, are damaged, or the folder holds something else.
        OSError: it could not be written.
    """
    folder = Path(folder)
    fingerprint = _joint_fingerprint(parts)
    paths = [path for part in parts for path in part.shard_paths]
    duplicate = find_duplicate_key(paths)
    if duplicate:
        names = ", ".join(str(part.path) for part in parts)
        raise CacheError(f"{names}: {duplicate}, but a key names one image; merge caches of different images")
    if any(folder.resolve() == part.path.resolve() for part in parts):
        raise CacheError(f"{folder} is one of the parts; merge into another folder")
    with exclusive(folder):
        remove_unfinished(folder)
        there = committed_shards(folder, fingerprint)
        for number, path in enumerate(paths):
            if number not in there:
                _copy_shard(path, folder, number, fingerprint)
        finish(folder, len(paths), fingerprint)
    return EmbeddingCache(folder)


def concat(parts: Sequence[EmbeddingCache]) -> "ConcatenatedCache":
    """Read several caches as one, where they are: rows and captions are numbered through the parts in order.

    Raises:
        CacheError: the fingerprints differ in more than the source, or the widths differ.
    """
    return ConcatenatedCache(parts)


class ConcatenatedCache(EmbeddingCache):
    """Several complete caches with the interface of one. Keys are compared by `verify`, not when it is made.

    Attributes:
        parts: the caches, in order.
        path: the folder of the first; for messages.
    """

    def __init__(self, parts: Sequence[EmbeddingCache]) -> None:
        fingerprint = _joint_fingerprint(parts)
        self.parts = list(parts)
        self.created_by = sorted({text for part in parts for text in part.created_by})
        self.path, self._folder = parts[0].path, parts[0].path.absolute()
        self._take(
            [shard for part in parts for shard in part.located_shards()],
            max(part.dim for part in parts if len(part) or not any(map(len, parts))),
            fingerprint,
        )

    def find_problems(self) -> list[Problem]:
        """What is wrong with any part, and keys that are in two of them."""
        problems = [problem for part in self.parts for problem in part.find_problems()]
        duplicate = None if problems else find_duplicate_key(self.shard_paths)
        return [*problems, Problem(f"{duplicate}, but a key names one image")] if duplicate else problems


def _joint_fingerprint(parts: Sequence[EmbeddingCache]) -> dict[str, Any]:
    if len(parts) < 2:
        raise CacheError(f"{len(parts)} cache was given, two or more were wanted")
    filled = [part for part in parts if len(part)]
    for part in parts[1:]:
        pair = [{k: v for k, v in cache.fingerprint.items() if k != "source"} for cache in (parts[0], part)]
        differences = differing_fields(*pair)
        if differences:
            raise CacheError(
                f"{parts[0].path} and {part.path} were not made alike: {'; '.join(differences)} (there); "
                "put together only what one tower made"
            )
    for part in filled[1:]:
        if part.dim != filled[0].dim:
            raise CacheError(f"rows have {filled[0].dim} numbers in {filled[0].path}, {part.dim} in {part.path}")
    return {**parts[0].fingerprint, "source": {"merged": [part.fingerprint.get("source") for part in parts]}}


def _copy_shard(path: Path, folder: Path, number: int, fingerprint: dict[str, Any]) -> None:
    with open_shard(path) as file:
        try:
            arrays = {name: file[name][()] for name in DATASETS}
            stated, created_by = str(file.attrs["checksum"]), str(file.attrs.get("created_by", ""))
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise CacheError(f"{path} cannot be read ({error}); {REMAKE_SHARD}") from None
    if content_checksum(arrays) != stated:
        raise CacheError(f"{path}: its data is damaged; {REMAKE_SHARD}, then merge again")
    commit_arrays(folder, number, arrays, fingerprint, created_by)
