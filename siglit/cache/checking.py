"""Check a cache as a whole, and delete its damaged shards so that precompute makes them again.

Reads all of it. The checks of a single shard are in `format.py`; knows nothing of how embeddings are computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siglit.cache.format import (
    INDEX_NAME,
    CacheError,
    ShardRecord,
    describe_shard,
    open_shard,
    shard_files,
    shard_fingerprint,
    shard_problems,
    unpack_strings,
)
from siglit.cache.keys import find_duplicate_key
from siglit.runtime.files import fsync_folder

REMAKE = "run `siglit precompute` again"
REMAKE_INDEX = f"delete it and {REMAKE}"
REMAKE_SHARD = f"delete this shard and {INDEX_NAME}, then {REMAKE}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a cache."""

    text: str
    """Message: what is wrong, and what to do."""
    shard: Path | None = None
    """The shard to make again, if that fixes the problem."""


def find_problems(
    folder: Path,
    shards: Sequence[ShardRecord],
    fingerprint: Mapping[str, Any],
    num_skipped: int,
    metadata_checksums: Sequence[str] | None,
    created_by: Sequence[str],
) -> list[Problem]:
    """Read every byte and compare it with the index; empty if the cache is sound.

    Args:
        folder: the cache's folder.
        shards: what index.json says of every shard.
        fingerprint: that of the index.
        num_skipped: that of the index.
        metadata_checksums: those of the index, one per shard; None where an earlier siglit wrote none: bytes outside
            the datasets are then not compared.
        created_by: that of the index; empty where an earlier siglit wrote none.
    """
    problems, readable = [], []
    for number, shard in enumerate(shards):
        path = folder / shard.file
        checksum = None if metadata_checksums is None else metadata_checksums[number]
        of_shard = _problems_of_shard(path, number, shard, fingerprint, checksum)
        readable += [path] if len(of_shard) == 0 else []
        problems += of_shard
    if sum(shard.skipped for shard in shards) != num_skipped:
        problems.append(
            Problem(f"{folder / INDEX_NAME}: counts of skipped images differ between index and shards; {REMAKE_INDEX}")
        )
    if len(created_by) > 0 and len(readable) == len(shards) and list(created_by) != _created_by(readable):
        problems.append(
            Problem(f"{folder / INDEX_NAME}: created_by is not what the shards say they were made with; {REMAKE_INDEX}")
        )
    indexed = {shard.file for shard in shards}
    problems += [
        Problem(f"{path} is not in {INDEX_NAME}; delete it if no process is writing this cache", path)
        for path in shard_files(folder).values()
        if path.name not in indexed
    ]
    return problems + _problems_of_keys(folder, readable)


def find_problems_without_index(folder: Path) -> list[Problem]:
    """Problems of the committed shards of a cache without index.json, each compared with its own attributes."""
    problems, readable = [], []
    for number, path in shard_files(folder).items():
        try:
            with open_shard(path) as file:
                record, fingerprint = describe_shard(file, path), shard_fingerprint(file)
        except CacheError as error:
            problems.append(Problem(str(error), path))
            continue
        of_shard = _problems_of_shard(path, number, record, fingerprint, None)
        readable += [path] if len(of_shard) == 0 else []
        problems += of_shard
    return problems + _problems_of_keys(folder, readable)


def no_cache(path: Path) -> str:
    """Message for a folder that does not exist; for a relative path it names the working directory."""
    start = "" if path.is_absolute() else f" (the working directory is {Path.cwd()})"
    return f"there is no cache at {path}{start}; create it with `siglit precompute`, or check the path"


@dataclass(frozen=True)
class Unfinished:
    """What the committed shards of a cache without index.json contain, by their own attributes."""

    shards: list[ShardRecord]
    skipped: list[tuple[str, str]]
    """(key, reason) of every image that has no row."""
    created_by: list[str]
    fingerprint: dict[str, Any]
    """That of the first shard; empty if there is no shard."""


def read_unfinished(folder: Path) -> Unfinished:
    """Read the shards of a cache that is not complete.

    Raises:
        CacheError: the folder does not exist, or a shard cannot be read.
    """
    if not folder.is_dir():
        raise CacheError(no_cache(folder))
    records: list[ShardRecord] = []
    skipped: list[tuple[str, str]] = []
    fingerprint: dict[str, Any] = {}
    created_by = set()
    for path in shard_files(folder).values():
        with open_shard(path) as file:
            records.append(describe_shard(file, path))
            texts = [
                unpack_strings(file[f"{name}_bytes"][()], file[f"{name}_offsets"][()])
                for name in ("skipped_key", "skipped_reason")
            ]
            skipped += zip(*texts, strict=True)
            created_by.add(str(file.attrs.get("created_by", "")))
            fingerprint = fingerprint or shard_fingerprint(file)
    return Unfinished(records, skipped, sorted(created_by), fingerprint)


def shards_with_skipped(folder: Path) -> list[Path]:
    """The committed shards that list images without a row.

    Raises:
        CacheError: a shard cannot be read.
    """
    paths = []
    for path in shard_files(folder).values():
        with open_shard(path) as file:
            if describe_shard(file, path).skipped:
                paths.append(path)
    return paths


def remove_shards(folder: Path, shards: Sequence[Path]) -> list[str]:
    """Delete shards and return their names; index.json goes first, so that the cache never looks complete.

    Call it with the folder locked.
    """
    if len(shards) == 0 and not (folder / INDEX_NAME).exists():
        return []
    (folder / INDEX_NAME).unlink(missing_ok=True)
    for path in shards:
        path.unlink(missing_ok=True)
    fsync_folder(folder)
    return [path.name for path in shards]


def _problems_of_shard(
    path: Path, number: int, record: ShardRecord, fingerprint: Mapping[str, Any], checksum: str | None
) -> list[Problem]:
    try:
        messages = shard_problems(path, number, record, fingerprint, checksum)
    except CacheError as error:
        return [Problem(str(error), path)]
    return [Problem(f"{path}: {message}; {REMAKE_SHARD}", path) for message in messages]


def _created_by(paths: Sequence[Path]) -> list[str]:
    """What `finish` writes into the index: the different software versions of the shards, sorted."""
    found = set()
    for path in paths:
        with open_shard(path) as file:
            found.add(str(file.attrs.get("created_by", "")))
    return sorted(found)


def _problems_of_keys(folder: Path, paths: Sequence[Path]) -> list[Problem]:
    duplicate = find_duplicate_key(paths)
    if duplicate is None:
        return []
    # The source has to be fixed: shards made again would have the same keys, so no shard is named.
    return [Problem(f"{folder}: {duplicate}, but keys must be unique; fix the source and {REMAKE}")]
