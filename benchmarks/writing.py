"""Committing one shard, against the layout of clip-retrieval (.npy and parquet) written from the same rows.

    python -m benchmarks.writing --json writing.json

A shard is on the disk when `write_shard` returns: checksum, fsync of the file and of its folder. clip-retrieval leaves
that to the system, so both are timed: its layout as it is written there, and with the same fsyncs.
"""

import argparse
import itertools
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from benchmarks.common import interleaved, parser, ratio, report
from siglit.cache import write_shard


def main() -> None:
    """Draw rows, take turns, report."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=8192, help="rows of a shard")
    options.add_argument("--dim", type=int, default=768, help="width")
    options.add_argument("--repeats", type=int, default=9, help="turns")
    options.add_argument("--folder", help="where to write; default: the system's temporary folder")
    args = options.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        seconds = measure(args, Path(folder))
    median = {name: float(np.median(taken)) for name, taken in seconds.items()}
    ratios = {name: ratio(seconds["siglit"], seconds[name]) for name in seconds if name != "siglit"}
    table = [(f"siglit / {name}", f"{value:.2f}", "") for name, value in ratios.items()]
    table += [(f"rows/s: {name}", f"{args.rows / taken:,.0f}", "") for name, taken in median.items()]
    figures = {"seconds": median, "ratios": ratios, "options": {k: v for k, v in vars(args).items() if k != "json"}}
    title = f"writing {args.rows} rows × {args.dim}, a caption each, median of {args.repeats} turns"
    report(title, table, figures, args.json)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of each way to write, one for each turn."""
    rows = np.random.default_rng(0).standard_normal((args.rows, args.dim), np.float32)
    keys = [f"train2017/{row:012d}.jpg" for row in range(args.rows)]
    captions = [f"a photograph of thing number {row} on a table" for row in range(args.rows)]
    number = itertools.count()

    def shard() -> None:
        write_shard(
            folder,
            next(number),
            embeddings=rows,
            keys=keys,
            captions=[[caption] for caption in captions],
            fingerprint={"source": "benchmarks.writing"},
        )

    def npy_and_parquet(sync: bool) -> None:
        stem = f"{next(number):05d}"
        with open(folder / f"img_emb_{stem}.npy", "wb") as file:
            np.save(file, rows.astype(np.float16))
            _sync(file, sync)
        with open(folder / f"metadata_{stem}.parquet", "wb") as file:
            parquet.write_table(pyarrow.table({"image_path": keys, "caption": captions}), file)
            _sync(file, sync)

    return interleaved(
        {
            "siglit": shard,
            "clip-retrieval's layout": lambda: npy_and_parquet(False),
            "clip-retrieval's layout, fsynced": lambda: npy_and_parquet(True),
        },
        args.repeats,
    )


def _sync(file, durable: bool) -> None:
    if durable:
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
