"""Several caches as one: copied into a new cache, or read together in place.

The parts must have one fingerprint, apart from `source`, and keys that are unique over all of them. Knows nothing of
towers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

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
from siglit.cache.shard_writer import commit_arrays, committed_shards, finish, remove_unfinished
from siglit.runtime.text import plural


def merge(folder: Path, parts: Sequence[EmbeddingCache]) -> EmbeddingCache:
    """Copy the shards of complete caches into one, in order; rows keep their bytes and shards their checksums.

    Files are rewritten and not linked, because they contain the shard's number and fingerprint. One shard is in memory
    at a time, and its checksum is compared. Resumes a killed merge of the same parts.

    Args:
        folder: the merged cache's folder; not one of the parts.
        parts: at least two caches.

    Returns:
        The merged cache. Its fingerprint's source is {"merged": [source of every part]}.

    Raises:
        CacheError: fewer than two parts, they differ in fingerprint or width, share a key, or are damaged, or the
            folder holds another cache.
        OSError: the merged cache could not be written.
    """
    folder = Path(folder)
    fingerprint = _joint_fingerprint(parts)
    paths = [path for part in parts for path in part.shard_paths]
    duplicate = find_duplicate_key(paths)
    if duplicate is not None:
        names = ", ".join(str(part.path) for part in parts)
        raise CacheError(f"{names}: {duplicate}, but keys must be unique; merge caches of different images")
    if any(folder.resolve() == part.path.resolve() for part in parts):
        raise CacheError(f"{folder} is one of the parts; merge into another folder")
    with exclusive(folder):
        remove_unfinished(folder)
        committed = committed_shards(folder, fingerprint)
        for number, path in enumerate(paths):
            if number not in committed:
                _copy_shard(path, folder, number, fingerprint)
        finish(folder, len(paths), fingerprint)
    return EmbeddingCache(folder)


def concat(parts: Sequence[EmbeddingCache]) -> "ConcatenatedCache":
    """Read several caches as one, in place; rows and captions are numbered through the parts in order.

    Raises:
        CacheError: fewer than two parts, or they differ in width or in a fingerprint field other than `source`.
    """
    return ConcatenatedCache(parts)


class ConcatenatedCache(EmbeddingCache):
    """Several complete caches with the interface of one. `verify` compares the keys of the parts; opening does not.

    Attributes:
        parts: the caches, in order.
        path: the folder of the first part; for messages.
    """

    def __init__(self, parts: Sequence[EmbeddingCache]) -> None:
        fingerprint = _joint_fingerprint(parts)
        self.parts = list(parts)
        self.created_by = sorted({text for part in parts for text in part.created_by})
        self.path, self._folder = parts[0].path, parts[0].path.absolute()
        self._set_shards(
            [shard for part in parts for shard in part.located_shards()],
            max(part.dim for part in parts if len(part) > 0 or not any(map(len, parts))),
            fingerprint,
        )

    @override
    def find_problems(self) -> list[Problem]:
        """The problems of each part; if there are none, a key that two parts share."""
        problems = [problem for part in self.parts for problem in part.find_problems()]
        duplicate = None if len(problems) > 0 else find_duplicate_key(self.shard_paths)
        return problems if duplicate is None else [Problem(f"{duplicate}, but keys must be unique")]


def _joint_fingerprint(parts: Sequence[EmbeddingCache]) -> dict[str, Any]:
    """The fingerprint of the parts together; refuses parts of different settings or widths."""
    if len(parts) < 2:
        raise CacheError(f"got {plural(len(parts), 'cache')}; expected at least two")
    filled = [part for part in parts if len(part) > 0]
    for part in parts[1:]:
        actual, expected = ({k: v for k, v in cache.fingerprint.items() if k != "source"} for cache in (part, parts[0]))
        differences = differing_fields(actual, expected)
        if len(differences) > 0:
            raise CacheError(
                f"{part.path} was made with other settings than {parts[0].path}: {'; '.join(differences)}; "
                "combine only caches of one tower"
            )
    for part in filled[1:]:
        if part.dim != filled[0].dim:
            raise CacheError(
                f"embeddings have width {filled[0].dim} in {filled[0].path}, {part.dim} in {part.path}; "
                "combine only caches of one tower"
            )
    return {**parts[0].fingerprint, "source": {"merged": [part.fingerprint.get("source") for part in parts]}}


def _copy_shard(path: Path, folder: Path, number: int, fingerprint: dict[str, Any]) -> None:
    """Commit the data of the shard at `path` as shard `number` of the cache in `folder`."""
    with open_shard(path) as file:
        try:
            arrays = {name: file[name][()] for name in DATASETS}
            checksum, created_by = str(file.attrs["checksum"]), str(file.attrs.get("created_by", ""))
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise CacheError(f"{path} cannot be read ({error}); {REMAKE_SHARD}") from None
    if content_checksum(arrays) != checksum:
        raise CacheError(f"{path}: its data is damaged; {REMAKE_SHARD}, then merge again")
    commit_arrays(folder, number, arrays, fingerprint, created_by)
