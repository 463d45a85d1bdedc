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
from siglit.cache import CacheError, EmbeddingCache, Problem
from siglit.errors import UserError


@dataclass(frozen=True)
class CacheInfo:
    """What a cache is."""

    path: str
    rows: int
    dim: int
    captions: int
    shards: int
    size: int
    """Bytes of the shards."""
    skipped_by_reason: dict[str, int]
    digest: str
    fingerprint: dict[str, Any]

    def __str__(self) -> str:
        """One line per property, then the fingerprint as JSON."""
        skipped = "".join(f"\n  {count:,} {reason}" for reason, count in self.skipped_by_reason.items())
        return (
            f"{self.path}\nrows         {self.rows:,} × {self.dim} float16\ncaptions     {self.captions:,}\n"
            f"size         {self.size / 1e6:,.1f} MB in {self.shards:,} shards\n"
            f"skipped      {sum(self.skipped_by_reason.values()):,}{skipped}\ndigest       {self.digest}\n"
            f"fingerprint  {json.dumps(self.fingerprint, indent=1, ensure_ascii=False)}"
        )


@dataclass(frozen=True)
class Verification:
    """Whether a cache is sound."""

    path: str
    problems: list[str]
    removed: list[str] | None = None
    """Files that --repair deleted; None if it was not asked for."""

    @property
    def exit_code(self) -> int:
        """0 sound, 2 not, also once the bad shards are away: they are yet to be made."""
        return 2 if self.problems else 0

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
class Skipped:
    """The images of a cache that have no row."""

    images: list[tuple[str, str]]

    def __str__(self) -> str:
        """CSV with the columns key and reason."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("key", "reason"), *self.images])
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


def info(path: str) -> CacheInfo:
    """Describe a complete cache.

    Raises:
        CacheError: there is none.
    """
    cache = EmbeddingCache(path)
    return CacheInfo(
        path=path,
        rows=len(cache),
        dim=cache.dim,
        captions=cache.num_captions,
        shards=len(cache.shard_paths),
        size=cache.size,
        skipped_by_reason=dict(Counter(reason for _, reason in cache.skipped).most_common()),
        digest=cache.digest,
        fingerprint=cache.fingerprint,
    )


def verify(path: str, repair: bool = False) -> Verification:
    """Read all of a cache again and compare it with its checksums, its index and itself.

    Args:
        path: the folder.
        repair: delete the bad shards, and index.json, so that `siglit precompute` makes them again.

    Raises:
        CacheError: there is no cache, or (repair) somebody is writing it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CacheError(f"there is no cache at {path}; correct the path")
    if not repair:
        return Verification(path, [problem.text for problem in _problems(folder)])
    with caches.exclusive(folder):
        problems = _problems(folder)
        bad = sorted({problem.shard for problem in problems if problem.shard})
        damaged_index = any(problem.shard is None and "index.json" in problem.text for problem in problems)
        removed = caches.remove_shards(folder, bad) if bad or damaged_index else []
    return Verification(path, [p.text for p in problems], [*removed, "index.json"] if bad or damaged_index else [])


def skipped(path: str) -> Skipped:
    """List the images of a cache that have no row, with the reason."""
    return Skipped(EmbeddingCache(path).skipped)


def merge(out: str, parts: list[str]) -> Made:
    """Copy complete caches of one tower into a new one.

    Raises:
        CacheError: they do not fit each other, or share a key.
        UserError: fewer than two were given.
    """
    if len(parts) < 2:
        raise UserError(f"only {', '.join(parts)} is to be merged; name two caches or more")
    cache = caches.merge(Path(out), [EmbeddingCache(part) for part in parts])
    return Made(out, len(cache), cache.dim)


def _problems(folder: Path) -> list[Problem]:
    try:
        return EmbeddingCache(folder).find_problems()
    except CacheError as error:
        return [Problem(str(error)), *caches.find_problems_without_index(folder)]
