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
    """What is wrong, and what to do."""
    shard: Path | None = None
    """The shard to make again, if that mends it."""


def find_problems(
    folder: Path,
    shards: Sequence[ShardRecord],
    fingerprint: Mapping[str, Any],
    num_skipped: int,
    metadata_checksums: Sequence[str] | None,
) -> list[Problem]:
    """Read every byte again and compare it with what the index says; empty if the cache is sound.

    Without `metadata_checksums`, which earlier versions did not write, bytes outside of the datasets are not compared.
    """
    problems, readable = [], []
    for number, shard in enumerate(shards):
        path = folder / shard.file
        outside = metadata_checksums[number] if metadata_checksums else None
        found = _of_shard(path, number, shard, fingerprint, outside)
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
        found = _of_shard(path, number, record, fingerprint, None)
        readable += [] if found else [path]
        problems += found
    return problems + _of_keys(folder, readable)


def no_cache(path: Path) -> str:
    """What to say where there is no folder; a relative path with the folder that it starts from."""
    start = "" if path.is_absolute() else f" (the working directory is {Path.cwd()})"
    return f"there is no cache at {path}{start}; make it with `siglit precompute`, or correct the path"


@dataclass(frozen=True)
class Unfinished:
    """What the committed shards of a cache without index.json say of themselves."""

    shards: list[ShardRecord]
    skipped: list[tuple[str, str]]
    """(key, reason) of every image that has no row."""
    created_by: list[str]
    fingerprint: dict[str, Any]
    """The first shard's; empty if there is none."""


def read_unfinished(folder: Path) -> Unfinished:
    """Read the shards of a cache that is not complete.

    Raises:
        CacheError: there is no such folder, or a shard cannot be read.
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


def _of_shard(
    path: Path, number: int, record: ShardRecord, fingerprint: Mapping[str, Any], outside: str | None
) -> list[Problem]:
    try:
        texts = shard_problems(path, number, record, fingerprint, outside)
    except CacheError as error:
        return [Problem(str(error), path)]
    return [Problem(f"{path}: {text}; {REMAKE_SHARD}", path) for text in texts]


def _of_keys(folder: Path, paths: Sequence[Path]) -> list[Problem]:
    duplicate = find_duplicate_key(paths)
    if not duplicate:
        return []
    # Making the shards again would find the same keys again: the source is to be mended, so no shard is named.
    return [Problem(f"{folder}: {duplicate}, but a key names one image; make the keys unique and {REMAKE}")]
