"""`siglit cache info | verify | skipped | merge`: look at a cache, see that it is sound, put several together.

Takes folders, not experiments; returns what is to be printed.
"""

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siglit import cache as caches
from siglit.cache import CacheError, EmbeddingCache, Problem, Unfinished
from siglit.errors import UserError


@dataclass(frozen=True)
class CacheInfo:
    """What a cache is."""

    path: str
    complete: bool
    rows: int
    dim: int
    captions: int
    shards: int
    size: int
    """Bytes of the shards."""
    skipped_by_reason: dict[str, int]
    digest: str | None
    """None while it is not complete."""
    created_by: list[str]
    """Versions of the software that made its shards; empty where an earlier siglit completed it."""
    fingerprint: dict[str, Any]

    def __str__(self) -> str:
        """One line per property, then the fingerprint as JSON."""
        skipped = "".join(f"\n  {count:,} {reason}" for reason, count in self.skipped_by_reason.items())
        state = f"not complete: {self.shards:,} shards are committed; run `siglit precompute` again\n"
        return (
            f"{self.path}\n{'' if self.complete else state}"
            f"rows         {self.rows:,} × {self.dim} float16\ncaptions     {self.captions:,}\n"
            f"size         {self.size / 1e6:,.1f} MB in {self.shards:,} shards\n"
            f"skipped      {sum(self.skipped_by_reason.values()):,}{skipped}\n"
            f"digest       {self.digest or 'none yet'}\n"
            f"created by   {'; '.join(self.created_by) or 'not recorded'}\n"
            f"fingerprint  {json.dumps(self.fingerprint, indent=1, ensure_ascii=False)}"
        )


@dataclass(frozen=True)
class CacheInfos:
    """What the caches of a folder are."""

    caches: list[CacheInfo]

    def __str__(self) -> str:
        """One after the other."""
        return "\n\n".join(map(str, self.caches))


@dataclass(frozen=True)
class Verification:
    """Whether a cache is sound."""

    path: str
    problems: list[str]
    removed: list[str] | None = None
    """Files that --repair deleted; None if it was not asked for."""

    def __str__(self) -> str:
        """One line per problem, one for what was done."""
        if not self.problems:
            return f"{self.path} is sound"
        lines = list(self.problems)
        if self.removed:
            lines.append(f"deleted {', '.join(self.removed)}: `siglit precompute` makes them again")
        elif self.removed is not None:
            lines.append("nothing was deleted: no shard that could be made again is at fault")
        return "\n".join(lines)


@dataclass(frozen=True)
class Verifications:
    """Whether the caches of a folder are sound."""

    caches: list[Verification]

    @property
    def exit_code(self) -> int:
        """0 all sound, 2 not, also once the bad shards are away: they are yet to be made."""
        return 2 if any(cache.problems for cache in self.caches) else 0

    def __str__(self) -> str:
        """One after the other."""
        return "\n".join(map(str, self.caches))


@dataclass(frozen=True)
class Skipped:
    """The images that have no row, of one cache or of several."""

    images: dict[str, list[tuple[str, str]]]
    """Folder of each cache → its images' keys and reasons."""

    def __str__(self) -> str:
        """CSV with the columns key and reason, after the column cache if there are several."""
        text = io.StringIO()
        rows = [(path, *image) for path, images in self.images.items() for image in images]
        first = 0 if len(self.images) > 1 else 1
        csv.writer(text, lineterminator="\n").writerows(row[first:] for row in [("cache", "key", "reason"), *rows])
        return text.getvalue().rstrip("\n")


@dataclass(frozen=True)
class Made:
    """A cache that was made of others' rows."""

    path: str
    rows: int
    dim: int

    def __str__(self) -> str:
        """One line."""
        return f"{self.rows:,} rows × {self.dim} in {self.path}"


def cache_info(path: str) -> CacheInfos:
    """Describe a cache, complete or not, or all caches in a folder.

    Raises:
        CacheError: there is none.
    """
    return CacheInfos([_info(folder) for folder in _caches(path)])


def cache_verify(path: str, repair: bool = False) -> Verifications:
    """Read all of a cache again, or of all caches in a folder; compare it with its checksums, its index and itself.

    Args:
        path: the folder.
        repair: delete the bad shards, and index.json, so that `siglit precompute` makes them again.

    Raises:
        CacheError: there is no cache, or (repair) somebody is writing it.
    """
    return Verifications([_verify(folder, repair) for folder in _caches(path)])


def cache_skipped(path: str) -> Skipped:
    """List the images of a cache that have no row, with the reason; it need not be complete, or holds several caches.

    Raises:
        CacheError: there is none.
    """
    return Skipped({str(folder): _open(folder).skipped for folder in _caches(path)})


def cache_merge(out: str, parts: list[str]) -> Made:
    """Copy complete caches of one tower into a new one.

    Raises:
        CacheError: they do not fit each other, or share a key.
        UserError: fewer than two were given.
    """
    if len(parts) < 2:
        raise UserError(f"only {', '.join(parts)} is to be merged; name two caches or more")
    cache = caches.merge(Path(out), [EmbeddingCache(part) for part in parts])
    return Made(out, len(cache), cache.dim)


def _caches(path: str) -> list[Path]:
    """The folder itself if it is a cache, else those in it that are, such as train and val."""
    folder = Path(path)
    if not folder.is_dir():
        raise CacheError(caches.no_cache(folder))
    if _is_cache(folder):
        return [folder]
    found = sorted(part for part in folder.iterdir() if part.is_dir() and _is_cache(part))
    if not found:
        raise CacheError(f"no shard is in {path}, nor in a folder in it; run `siglit precompute`, or correct the path")
    return found


def _is_cache(folder: Path) -> bool:
    return (folder / "index.json").exists() or bool(caches.shard_files(folder))


def _open(folder: Path) -> EmbeddingCache | Unfinished:
    return EmbeddingCache(folder) if (folder / "index.json").exists() else caches.read_unfinished(folder)


def _info(folder: Path) -> CacheInfo:
    cache = _open(folder)
    shards = cache.shards if isinstance(cache, Unfinished) else cache.located_shards()
    return CacheInfo(
        path=str(folder),
        complete=isinstance(cache, EmbeddingCache),
        rows=sum(shard.rows for shard in shards),
        dim=max((shard.dim for shard in shards if shard.rows), default=0),
        captions=sum(shard.captions for shard in shards),
        shards=len(shards),
        size=sum(shard.size for shard in shards),
        skipped_by_reason=dict(Counter(reason for _, reason in cache.skipped).most_common()),
        digest=cache.digest if isinstance(cache, EmbeddingCache) else None,
        created_by=cache.created_by,
        fingerprint=cache.fingerprint,
    )


def _verify(folder: Path, repair: bool) -> Verification:
    path = str(folder)
    if not repair:
        return Verification(path, [problem.text for problem in _problems(folder)])
    with caches.exclusive(folder):
        problems = _problems(folder)
        bad = sorted({problem.shard for problem in problems if problem.shard})
        damaged_index = any(problem.shard is None and "index.json" in problem.text for problem in problems)
        index = ["index.json"] if (folder / "index.json").exists() else []
        removed = caches.remove_shards(folder, bad) if bad or damaged_index else []
    return Verification(path, [p.text for p in problems], [*removed, *index] if bad or damaged_index else [])


def _problems(folder: Path) -> list[Problem]:
    try:
        return EmbeddingCache(folder).find_problems()
    except CacheError as error:
        return [Problem(str(error)), *caches.find_problems_without_index(folder)]
