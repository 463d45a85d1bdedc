"""`siglit cache info | verify | skipped | merge`: describe a cache, check it, list its skipped images, merge several.

Takes folders, not experiments. Knows nothing of towers or training.
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
from siglit.runtime.text import plural


@dataclass(frozen=True)
class CacheInfo:
    """Contents and origin of a cache."""

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
    """Software versions that wrote its shards; empty if an earlier siglit completed it."""
    fingerprint: dict[str, Any]

    def __str__(self) -> str:
        """One line per property, then the fingerprint as JSON."""
        skipped = "".join(f"\n  {count:,} {reason}" for reason, count in self.skipped_by_reason.items())
        state = f"not complete: {plural(self.shards, 'shard')} committed; run `siglit precompute` to complete it\n"
        return (
            f"{self.path}\n{'' if self.complete else state}"
            f"rows         {self.rows:,} × {self.dim} float16\ncaptions     {self.captions:,}\n"
            f"size         {self.size / 1e6:,.1f} MB in {plural(self.shards, 'shard')}\n"
            f"skipped      {sum(self.skipped_by_reason.values()):,}{skipped}\n"
            f"digest       {self.digest or 'none yet'}\n"
            f"created by   {'; '.join(self.created_by) or 'not recorded'}\n"
            f"fingerprint  {json.dumps(self.fingerprint, indent=1, ensure_ascii=False)}"
        )


@dataclass(frozen=True)
class CacheInfos:
    """Contents and origin of the caches in a folder."""

    caches: list[CacheInfo]

    def __str__(self) -> str:
        """One cache after the other."""
        return "\n\n".join(map(str, self.caches))


@dataclass(frozen=True)
class Verification:
    """The problems of a cache; none if it is sound."""

    path: str
    problems: list[str]
    removed: list[str] | None = None
    """Files that `repair` deleted; None without `repair`."""

    def __str__(self) -> str:
        """One line per problem, and one for what `repair` did."""
        if len(self.problems) == 0:
            return f"{self.path} is sound"
        lines = list(self.problems)
        if self.removed is not None and len(self.removed) > 0:
            lines.append(f"deleted {', '.join(self.removed)}: run `siglit precompute` to rebuild them")
        elif self.removed is not None:
            lines.append("nothing was deleted: no problem is in a shard that precompute could rebuild")
        return "\n".join(lines)


@dataclass(frozen=True)
class Verifications:
    """The problems of the caches in a folder."""

    caches: list[Verification]

    @property
    def exit_code(self) -> int:
        """0 if all caches are sound, else 2; also 2 after a repair: the deleted shards are still to be rebuilt."""
        return 2 if any(len(cache.problems) > 0 for cache in self.caches) else 0

    def __str__(self) -> str:
        """One cache after the other."""
        return "\n".join(map(str, self.caches))


@dataclass(frozen=True)
class Skipped:
    """The skipped images of one cache or of several."""

    images: dict[str, list[tuple[str, str]]]
    """Folder of each cache → its images' keys and reasons."""

    def __str__(self) -> str:
        """CSV with the columns key and reason, after the column cache if there are several."""
        text = io.StringIO()
        rows = [(path, *image) for path, images in self.images.items() for image in images]
        first_column = 0 if len(self.images) > 1 else 1
        csv.writer(text, lineterminator="\n").writerows(
            row[first_column:] for row in [("cache", "key", "reason"), *rows]
        )
        return text.getvalue().rstrip("\n")


@dataclass(frozen=True)
class WrittenRows:
    """Rows that merge, import or export wrote into a folder."""

    path: str
    rows: int
    dim: int

    def __str__(self) -> str:
        """One line."""
        return f"{plural(self.rows, 'row')} × {self.dim} in {self.path}"


def cache_info(path: str) -> CacheInfos:
    """Describe a cache, complete or not, or all caches in a folder.

    Raises:
        CacheError: the folder neither is nor holds a cache.
    """
    return CacheInfos([_info(folder) for folder in _caches(path)])


def cache_verify(path: str, repair: bool = False) -> Verifications:
    """Read every byte of a cache, or of all caches in a folder, and check it against its checksums and its index.

    Args:
        path: the folder.
        repair: delete the bad shards, and index.json, so that `siglit precompute` rebuilds them.

    Raises:
        CacheError: the folder neither is nor holds a cache, or (repair) another process is writing it.
    """
    return Verifications([_verify(folder, repair) for folder in _caches(path)])


def cache_skipped(path: str) -> Skipped:
    """List the skipped images of a cache, complete or not, or of all caches in a folder, with the reasons.

    Raises:
        CacheError: the folder neither is nor holds a cache.
    """
    return Skipped({str(folder): _open(folder).skipped for folder in _caches(path)})


def cache_merge(out: str, parts: list[str]) -> WrittenRows:
    """Copy complete caches of one image tower into a new one.

    Raises:
        CacheError: the caches are of different towers, or two have the same key.
        UserError: fewer than two caches are given.
    """
    if len(parts) < 2:
        raise UserError(f"cache merge needs at least two caches to merge, got {len(parts)}")
    cache = caches.merge(Path(out), [EmbeddingCache(part) for part in parts])
    return WrittenRows(out, len(cache), cache.dim)


def _caches(path: str) -> list[Path]:
    """The folder itself if it is a cache, else the caches in it, such as train and val."""
    folder = Path(path)
    if not folder.is_dir():
        raise CacheError(caches.no_cache(folder))
    if _is_cache(folder):
        return [folder]
    children = sorted(child for child in folder.iterdir() if child.is_dir() and _is_cache(child))
    if len(children) == 0:
        raise CacheError(f"{path} holds no cache; run `siglit precompute`, or check the path")
    return children


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
        removed = []
        if len(bad) > 0 or damaged_index:
            index = ["index.json"] if (folder / "index.json").exists() else []
            removed = [*caches.remove_shards(folder, bad), *index]
    return Verification(path, [problem.text for problem in problems], removed)


def _problems(folder: Path) -> list[Problem]:
    try:
        return EmbeddingCache(folder).find_problems()
    except CacheError as error:
        return [Problem(str(error)), *caches.find_problems_without_index(folder)]
