"""Judge a cache as a whole, and take its bad shards away so that they are made again.

Reads all of it; what makes a single shard whole is said in `format.py`.
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
    find_duplicate_key,
    open_shard,
    shard_files,
    shard_fingerprint,
    shard_problems,
)
from siglit.files import fsync_folder

REMAKE = "run `siglit precompute` again"
REMAKE_INDEX = f"delete it and {REMAKE}"
REMAKE_SHARD = f"delete this shard and {INDEX_NAME}, then {REMAKE}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a cache."""

    text: str
    """What is wrong, and what to do."""
    shard: Path | None = None
    """The shard to make again, if that mends it."""


def find_problems(
    folder: Path, shards: Sequence[ShardRecord], fingerprint: Mapping[str, Any], num_skipped: int
) -> list[Problem]:
    """Read everything again and compare it with what the index says; empty if the cache is sound."""
    problems, readable = [], []
    for number, shard in enumerate(shards):
        path = folder / shard.file
        found = _of_shard(path, number, shard, fingerprint)
        readable += [] if found else [path]
        problems += found
    if sum(shard.skipped for shard in shards) != num_skipped:
        problems.append(Problem(f"{folder / INDEX_NAME}: counts of skipped images differ; {REMAKE_INDEX}"))
    known = {shard.file for shard in shards}
    problems += [
        Problem(f"{path} is not in {INDEX_NAME}; delete it if nobody is writing this cache", path)
        for path in shard_files(folder).values()
        if path.name not in known
    ]
    return problems + _of_keys(folder, readable)


def find_problems_without_index(folder: Path) -> list[Problem]:
    """What is wrong with the shards that are there, each judged by what it says of itself."""
    problems, readable = [], []
    for number, path in shard_files(folder).items():
        try:
            with open_shard(path) as file:
                record, fingerprint = describe_shard(file, path), shard_fingerprint(file)
        except CacheError as error:
            problems.append(Problem(str(error), path))
            continue
        found = _of_shard(path, number, record, fingerprint)
        readable += [] if found else [path]
        problems += found
    return problems + _of_keys(folder, readable)


def shards_with_skipped(folder: Path) -> list[Path]:
    """The committed shards that list images without a row.

    Raises:
        CacheError: a shard cannot be read.
    """
    found = []
    for path in shard_files(folder).values():
        with open_shard(path) as file:
            if describe_shard(file, path).skipped:
                found.append(path)
    return found


def remove_shards(folder: Path, shards: Sequence[Path]) -> list[str]:
    """Delete shards, and index.json before them, so that the cache never looks complete; return the names.

    Call it with the folder locked.
    """
    if not shards and not (folder / INDEX_NAME).exists():
        return []
    (folder / INDEX_NAME).unlink(missing_ok=True)
    for path in shards:
        path.unlink(missing_ok=True)
    fsync_folder(folder)
    return [path.name for path in shards]


def _of_shard(path: Path, number: int, record: ShardRecord, fingerprint: Mapping[str, Any]) -> list[Problem]:
    try:
        texts = shard_problems(path, number, record, fingerprint)
    except CacheError as error:
        return [Problem(str(error), path)]
    return [Problem(f"{path}: {text}; {REMAKE_SHARD}", path) for text in texts]


def _of_keys(folder: Path, paths: Sequence[Path]) -> list[Problem]:
    duplicate = find_duplicate_key(paths)
    if not duplicate:
        return []
    # Making the shards again would find the same keys again: the source is to be mended, so no shard is named.
    return [Problem(f"{folder}: {duplicate}, but a key names one image; make the keys unique and {REMAKE}")]
