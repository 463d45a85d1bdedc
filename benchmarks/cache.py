"""Gathering shuffled rows from a cache against numpy on a raw memory map, h5py, and embedding-reader.

    python -m benchmarks.cache --json cache.json

All contenders hold the same rows and gather the same ones in each turn; files are warm in the page cache.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

from benchmarks.common import interleaved, parser, ratio, report
from siglit.cache import EmbeddingCache, finish, write_shard


def main() -> None:
    """Make the files, take turns, report."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=131_072, help="rows of the cache")
    options.add_argument("--dim", type=int, default=768, help="width")
    options.add_argument("--batch", type=int, default=8192, help="rows gathered at once")
    options.add_argument("--slow", type=int, default=512, help="rows read one by one, for the slow peer")
    options.add_argument("--repeats", type=int, default=31, help="turns")
    options.add_argument("--folder", help="where to make the files; default: the system's temporary folder")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = measure(args, Path(folder))
    table = [(name, f"{value:.2f}", target) for name, (value, target) in figures["ratios"].items()]
    table += [(f"rows/s: {name}", f"{value:,.0f}", "") for name, value in figures["rows_per_second"].items()]
    figures["ratios"] = {name: value for name, (value, _) in figures["ratios"].items()}
    title = f"gather: {args.batch} shuffled of {args.rows} rows × {args.dim} float16, median of {args.repeats} turns"
    report(title, table, figures, args.json)


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Time all contenders: rows/s by name, and (ratio, target) by name."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal((args.rows, args.dim), np.float32).astype(np.float16)
    caches = {shards: make_cache(folder / str(shards), data, shards) for shards in (1, 64)}
    np.save(folder / "raw.npy", data)
    raw = np.load(folder / "raw.npy", mmap_mode="r")
    with h5py.File(folder / "chunked.h5", "w") as file:
        file.create_dataset("auto", data=data, chunks=True)
        file.create_dataset("rows", data=data, chunks=(min(64, args.rows), args.dim))
    contiguous = h5py.File(next((folder / "1").glob("shard-*.h5")), "r")["embedding"]
    chunked = h5py.File(folder / "chunked.h5", "r")
    rows = np.empty(0, np.int64)

    def draw() -> None:
        nonlocal rows
        rows = rng.permutation(args.rows)[: args.batch]

    def sequential() -> None:
        for start in range(0, args.rows, args.batch):
            caches[64].gather(np.arange(start, min(start + args.batch, args.rows)))

    draw()
    for cache in caches.values():
        assert np.array_equal(cache.gather(rows), raw[rows])
    contenders = {
        "siglit, 1 shard": lambda: caches[1].gather(rows),
        "siglit, 64 shards": lambda: caches[64].gather(rows),
        "raw memmap": lambda: raw[rows],
        "h5py, sorted fancy index": lambda: contiguous[np.sort(rows)],
        "h5py's own chunks, row by row": lambda: [chunked["auto"][row] for row in rows[: args.slow]],
        "h5py, chunks of 64 rows, row by row": lambda: [chunked["rows"][row] for row in rows[: args.slow]],
        "siglit, 64 shards, in order": sequential,
    }
    counts = dict.fromkeys(contenders, args.batch)
    counts |= {name: args.slow for name in contenders if name.endswith("row by row")}
    counts["siglit, 64 shards, in order"] = args.rows
    peer = _embedding_reader(folder / "npy", data, args.batch)
    if peer:
        contenders["embedding-reader, in order"], counts["embedding-reader, in order"] = peer, args.rows
    turns = interleaved(contenders, args.repeats, before=draw)
    seconds = {name: [turn / counts[name] for turn in taken] for name, taken in turns.items()}
    return {"rows_per_second": _rates(seconds), "ratios": _ratios(seconds), "options": _plain(args)}


def _ratios(seconds: dict[str, list[float]]) -> dict[str, tuple[float, str]]:
    compared = {
        "siglit, 1 shard / raw memmap": ("raw memmap", "siglit, 1 shard", "≥ 0.95"),
        "siglit, 64 shards / raw memmap": ("raw memmap", "siglit, 64 shards", "≥ 0.95"),
        "siglit, 1 shard / h5py, sorted": ("h5py, sorted fancy index", "siglit, 1 shard", "≥ 8"),
        "siglit, 64 shards / h5py's own chunks, row by row": (
            "h5py's own chunks, row by row",
            "siglit, 64 shards",
            "≥ 100",
        ),
        "siglit, 64 shards / h5py, chunks of 64 rows, row by row": (
            "h5py, chunks of 64 rows, row by row",
            "siglit, 64 shards",
            "≥ 100",
        ),
        "in order, siglit / embedding-reader": ("embedding-reader, in order", "siglit, 64 shards, in order", ""),
    }
    return {
        name: (ratio(seconds[slow], seconds[fast]), target)
        for name, (slow, fast, target) in compared.items()
        if slow in seconds
    }


def _rates(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(1 / float(np.median(taken)), 1) for name, taken in seconds.items()}


def _plain(args: argparse.Namespace) -> dict:
    return {name: value for name, value in vars(args).items() if name != "json"}


def make_cache(folder: Path, data: np.ndarray, shards: int) -> EmbeddingCache:
    """Write (N, D) rows as a cache of that many shards, one caption each."""
    folder.mkdir()
    for number, rows in enumerate(np.array_split(np.arange(len(data)), shards)):
        write_shard(
            folder,
            number,
            embeddings=data[rows],
            keys=[str(row) for row in rows],
            captions=[["a caption"]] * len(rows),
            fingerprint={"source": "benchmarks.cache"},
        )
    finish(folder, shards, {"source": "benchmarks.cache"})
    return EmbeddingCache(folder)


def _embedding_reader(folder: Path, data: np.ndarray, batch: int) -> Callable[[], None] | None:
    """Reader of the same rows as 64 .npy files, in order, or None where the package is not there."""
    try:
        from embedding_reader import EmbeddingReader
    except ImportError:
        return None
    folder.mkdir()
    for number, part in enumerate(np.array_split(data, 64)):
        np.save(folder / f"{number:03d}.npy", part)
    reader = EmbeddingReader(embeddings_folder=str(folder), file_format="npy")

    def read() -> None:
        for _ in reader(batch_size=batch):
            pass

    return read


if __name__ == "__main__":
    main()
