"""Batches to the training step: what they add to the time and the memory of a text tower's steps.

    python -m benchmarks.batches --json batches.json

A step is forward and backward of the tower and the sigmoid loss, without an optimizer. "Making" a batch is timed with
nothing else going on, so it bounds what the thread can take from the step; "waiting" is the time that `next` takes.
"""

import argparse
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.cache import make_cache
from benchmarks.common import interleaved, parser, ratio, report
from siglit.config import TextTowerConfig
from siglit.data.cache_loader import CacheLoader
from siglit.data.epoch_loader import Batch
from siglit.loss import sigmoid_loss
from siglit.models.text_tower import PRESETS, TextTower

VOCABULARY = 32_000
ORDER = {"rows": "the permutation (4 bytes a row)", "blocks": "two windows of 131,072 rows"}


def main() -> None:
    """Make cache and tower, take turns, report."""
    options = parser(__doc__)
    options.add_argument(
        "--rows",
        type=int,
        default=262_144,
        help="rows of the cache; blocks are read ahead only where there are more than 131,072",
    )
    options.add_argument("--dim", type=int, default=768, help="width")
    options.add_argument("--batch", type=int, default=256, help="pairs of a step")
    options.add_argument("--tower", choices=list(PRESETS), default="S", help="size of the text tower")
    options.add_argument("--length", type=int, default=16, help="tokens of a caption")
    options.add_argument("--steps", type=int, default=2, help="steps of a turn")
    options.add_argument("--repeats", type=int, default=5, help="turns")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    table, figures = [], {"options": {k: v for k, v in vars(args).items() if k != "json"}}
    with tempfile.TemporaryDirectory() as folder:
        data = np.random.default_rng(0).standard_normal((args.rows, args.dim), np.float32).astype(np.float16)
        cache = make_cache(Path(folder) / "cache", data, 8)
        ids = np.random.default_rng(1).integers(2, VOCABULARY, (args.rows, args.length)).astype(np.uint16)
        for shuffle in ("rows", "blocks"):
            batches = CacheLoader(cache, ids, batch_size=args.batch, seed=0, shuffle=shuffle)
            figures[shuffle] = {**times(batches, args), "memory_added_batches": memory(batches)}
            table += [
                (f"{shuffle}: making a batch / step", f"{figures[shuffle]['making']:.2%}", "< 3 %"),
                (f"{shuffle}: waiting for a batch / step", f"{figures[shuffle]['waiting']:.2%}", ""),
                (f"{shuffle}: steps with batches / steps on one batch", f"{figures[shuffle]['slower']:.3f}", "< 1.03"),
                (
                    f"{shuffle}: memory added with {ORDER[shuffle]}, in batches",
                    f"{figures[shuffle]['memory_added_batches']:.2f}",
                    "",
                ),
            ]
    step = figures["rows"]["step_seconds"]
    table.append(("a step", f"{step:.2f} s", ""))
    title = f"batches of {args.batch} × {args.dim} for a tower {args.tower}, median of {args.repeats} turns"
    report(title, table, figures, args.json)


def times(batches: CacheLoader, args: argparse.Namespace) -> dict[str, float]:
    """Shares of a step: making a batch, waiting for one, and how much slower steps are with them."""
    tower = TextTower(
        TextTowerConfig(size=args.tower),
        vocab_size=VOCABULARY,
        length=args.length,
        eos_id=1,
        pad_id=1,
        dim=args.dim,
    )
    stream, inline, waited = endless(batches), batches._batches(0, 0), []
    fixed = next(stream)

    def step(batch: Batch) -> None:
        zimg = F.normalize(batch["image"].float(), dim=1)
        ztxt = F.normalize(tower(batch["ids"]), dim=1)
        sigmoid_loss(zimg, ztxt, torch.tensor(10.0), torch.tensor(-10.0)).backward()
        tower.zero_grad()

    def with_batches() -> None:
        waited.append(0.0)
        for _ in range(args.steps):
            begun = time.perf_counter()
            batch = next(stream)
            waited[-1] += time.perf_counter() - begun
            step(batch)

    next(inline)
    seconds = interleaved(
        {
            "alone": lambda: [step(fixed) for _ in range(args.steps)],
            "with": with_batches,
            "making": lambda: [next(inline) for _ in range(args.steps)],
        },
        args.repeats,
    )
    stream.close()
    return {
        "making": ratio(seconds["making"], seconds["alone"]),
        "waiting": ratio(waited[1:], seconds["alone"]),
        "slower": ratio(seconds["with"], seconds["alone"]),
        "step_seconds": statistics.median(seconds["alone"]) / args.steps,
    }


def memory(batches: CacheLoader) -> float:
    """Peak memory during a pass of slow steps, in batches, without the one that the step has."""
    tracemalloc.start()
    try:
        for number, batch in enumerate(batches):
            size = sum(tensor.nbytes for tensor in batch.values())
            time.sleep(0.01)
            if number == 20:
                break
        return tracemalloc.get_traced_memory()[1] / size - 1
    finally:
        tracemalloc.stop()


def endless(batches: CacheLoader) -> Iterator[Batch]:
    """Pass after pass."""
    while True:
        yield from batches


if __name__ == "__main__":
    main()
