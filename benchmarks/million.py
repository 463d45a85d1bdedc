"""One optimizer step of a micro text tower at a global batch of N pairs from a cache, in one process.

    python -m benchmarks.million --pairs 131072 --json million.json

The tower runs twice, in micro-batches: without a graph to embed all captions, and again for its gradients once the
loss has computed those of the embeddings (GradCache, arXiv:2101.06983). So one micro-batch's activations are alive at a
time, and of the whole batch only rows of width D. Shapes: N pairs, D embedding width, L tokens.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common import parser, peak_rss, plain_options, report
from siglit.cache import EmbeddingCache, finish, write_shard
from siglit.config import OptimConfig, TextTowerConfig
from siglit.loss import sigmoid, sigmoid_loss
from siglit.models.text_tower import TextTower
from siglit.runtime.progress import Meter
from siglit.training.optim import build_optimizer

VOCABULARY = 32_000
_ROWS_OF_A_SHARD = 131_072
GIB = 2**30


class Model(nn.Module):
    """The tower with t' and b, as the optimizer sees them."""

    def __init__(self, dim: int, length: int):
        super().__init__()
        self.tower = TextTower(
            TextTowerConfig(size="micro"), vocab_size=VOCABULARY, length=length, eos_id=1, pad_id=1, dim=dim
        )
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(n, L) ids of any integer type to (n, D) unit rows."""
        return F.normalize(self.tower(ids.long()), dim=1)


class Parts:
    """Seconds and the highest memory so far, by part of the step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    @contextlib.contextmanager
    def part(self, name: str, total: int, unit: str = "pairs") -> Iterator[Meter]:
        """Time a part and show how far it is."""
        begun = time.perf_counter()
        with Meter(name, total, unit) as meter:
            yield meter
        self.seconds[name] = time.perf_counter() - begun
        self.peak_bytes[name] = peak_rss()


def main() -> None:
    """Write the cache, take the step, report."""
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, default=131_072, help="pairs of the global batch N")
    options.add_argument("--dim", type=int, default=128, help="embedding width D")
    options.add_argument("--length", type=int, default=16, help="tokens of a caption L")
    options.add_argument("--micro-batch", type=int, default=1024, help="captions that the tower sees at once")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the embeddings")
    options.add_argument("--folder", help="where to write the cache; default: the system's temporary folder")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        cache = write_cache(Path(folder) / "cache", args)
        begun = peak_rss()
        parts, loss = step(cache, args)
    figures = {
        "options": plain_options(args),
        "loss": loss,
        "seconds": parts.seconds,
        "peak_bytes_so_far": parts.peak_bytes,
        "bytes_before_the_step": begun,
    }
    took = sum(parts.seconds.values())
    rows = [("the step", f"{took:,.1f} s", ""), ("pairs/s", f"{args.pairs / took:,.0f}", "")]
    rows += [
        (name, f"{taken:,.1f} s, {taken / took:.1%}, peak so far {parts.peak_bytes[name] / GIB:.2f} GiB", "")
        for name, taken in parts.seconds.items()
    ]
    rows += [
        ("peak memory before the step", f"{begun / GIB:.2f} GiB", ""),
        ("peak memory", f"{peak_rss() / GIB:.2f} GiB", "< 20 GiB"),
        ("loss of the step", f"{loss:.4f}", ""),
    ]
    report(f"one step at {args.pairs:,} pairs × {args.dim}, micro text tower, one process", rows, figures, args.json)


def write_cache(folder: Path, args: argparse.Namespace) -> EmbeddingCache:
    """Write N random unit rows with a caption each, shard by shard: the cache must not need the memory of the step."""
    folder.mkdir()
    rng, fingerprint = np.random.default_rng(0), {"source": "benchmarks.million"}
    starts = range(0, args.pairs, _ROWS_OF_A_SHARD)
    with Meter("writing the cache", args.pairs, "rows") as meter:
        for number, start in enumerate(starts):
            keys = [str(row) for row in range(start, min(start + _ROWS_OF_A_SHARD, args.pairs))]
            rows = rng.standard_normal((len(keys), args.dim), np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            captions = [["a caption"]] * len(keys)
            write_shard(folder, number, embeddings=rows, keys=keys, captions=captions, fingerprint=fingerprint)
            meter.advance(len(keys))
    finish(folder, len(starts), fingerprint)
    return EmbeddingCache(folder)


def step(cache: EmbeddingCache, args: argparse.Namespace) -> tuple[Parts, float]:
    """One step on all rows of the cache in a random order; its parts and its loss."""
    parts, dtype = Parts(), getattr(torch, args.dtype)
    model = Model(args.dim, args.length)
    optimizer = build_optimizer(model, OptimConfig(name="lion"), {})
    rng = np.random.default_rng(1)
    ids = torch.from_numpy(rng.integers(2, VOCABULARY, (len(cache), args.length)).astype(np.int32))
    order = rng.permutation(len(cache))
    micro = [slice(at, at + args.micro_batch) for at in range(0, len(cache), args.micro_batch)]

    zimg = torch.empty(len(cache), args.dim, dtype=dtype)
    with parts.part("gather", len(cache)) as meter:
        for some in micro:
            zimg[some] = F.normalize(torch.from_numpy(cache.gather(order[some])).float(), dim=1)
            meter.advance(len(zimg[some]))

    ztxt = torch.empty(len(cache), args.dim, dtype=dtype)
    with parts.part("tower, forward", len(cache)) as meter, torch.no_grad():
        for some in micro:
            ztxt[some] = model.embed(ids[some])
            meter.advance(len(ztxt[some]))

    ztxt.requires_grad_()
    with parts.part("loss", len(cache) ** 2) as meter, advanced_by_tile(meter):
        loss = sigmoid_loss(zimg, ztxt, model.log_scale.exp(), model.logit_bias)
        loss.backward()
    gradient = ztxt.grad
    assert gradient is not None
    del zimg, ztxt

    with parts.part("tower, again and backward", len(cache)) as meter:
        for some in micro:
            model.embed(ids[some]).backward(gradient[some].float())
            meter.advance(len(gradient[some]))

    with parts.part("optimizer", 1, "steps") as meter:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        meter.advance(1)
    return parts, loss.item()


@contextlib.contextmanager
def advanced_by_tile(meter: Meter) -> Iterator[None]:
    """Advance the meter by the pairs of each tile, as the sigmoid loss itself reports no progress."""
    original = sigmoid.tiles

    def counted(*arguments: Any) -> Iterator[tuple[slice, slice]]:
        for rows, columns in original(*arguments):
            yield rows, columns
            meter.advance((rows.stop - rows.start) * (columns.stop - columns.start))

    with mock.patch.object(sigmoid, "tiles", counted):
        yield


if __name__ == "__main__":
    main()
