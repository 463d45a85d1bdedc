"""Batches as SAIL makes them, from Python lists of tensors in memory, against siglit's from the cache.

Source of the peer: `VLEmbeddingDataset` and its loader in the code of SAIL, arXiv:2412.04616, written down anew. Its
texts are embeddings; here they are token ids, for the same tower is to be trained.
Shapes: N rows of the cache, B pairs of a step, L tokens, D embedding width.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import interleaved, ratio
from benchmarks.train_contenders import autocast
from benchmarks.train_turns import VOCABULARY, write_cache
from siglit.cache import EmbeddingCache
from siglit.config import OptimConfig, TextTowerConfig, TokenizerConfig
from siglit.data.cache_loader import CacheLoader
from siglit.data.tokens import token_ids
from siglit.loss import sigmoid_loss
from siglit.models.text_tower import TextTower
from siglit.models.tokenizer import load_tokenizer
from siglit.training.optim import build_optimizer

OURS = "siglit's batches"
WORKERS = (0, 2)
_READ_AT_ONCE = 8192


class SailRows(Dataset):
    """All N rows as two lists of tensors."""

    def __init__(self, cache: EmbeddingCache, ids: np.ndarray):
        """Read everything; a list grows by the rows of a loaded tensor, which are views of it."""
        self.images: list[torch.Tensor] = []
        self.texts: list[torch.Tensor] = []
        for start in range(0, len(cache), _READ_AT_ONCE):
            rows = np.arange(start, min(start + _READ_AT_ONCE, len(cache)))
            self.images.extend(torch.from_numpy(cache.gather(rows)))
            self.texts.extend(torch.from_numpy(ids[rows].astype(np.int32)))

    def __len__(self) -> int:
        """N."""
        return len(self.texts)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One pair."""
        return self.texts[number], self.images[number]


class Model(nn.Module):
    """The tower with t' and b, as the optimizer sees them."""

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.tower = TextTower(
            TextTowerConfig(size=args.text[0]),
            vocab_size=VOCABULARY,
            length=args.length,
            eos_id=1,
            pad_id=0,
            dim=args.dim,
        )
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        if args.device == "cuda":
            self.tower.compile()


def sail(folder: Path, args: argparse.Namespace, cache: EmbeddingCache, figures: dict[str, Any]) -> list:
    """Rows/s of the batches alone, examples/s of a step on them, and bytes of memory a row."""
    memory = _bytes_per_row(folder, args, cache)
    ids = _token_ids(folder, cache, args)
    held = SailRows(cache, ids)
    loaders = {name: (lambda make=make: make(cache, ids, held, args)) for name, make in _loaders().items()}
    alone = interleaved({name: (lambda open_=open_: _a_pass(open_())) for name, open_ in loaders.items()}, args.repeats)
    steps = _steps(loaders, args)
    rates = {name: statistics.median(len(cache) // args.batch * args.batch / s for s in t) for name, t in alone.items()}
    examples = {name: args.steps * args.batch / statistics.median(t) for name, t in steps.items()}
    faster = {name: ratio(steps[name], steps[OURS]) for name in loaders if name != OURS}
    share = {name: examples[name] / rates[name] for name in loaders}
    figures |= {"bytes_per_row": memory, "rows_per_second": rates, "examples_per_second": examples}
    figures |= {"siglit_over_sail": faster, "batches_of_a_step": share}
    head = f"text {args.text[0]}"
    rows = [(f"{head}: examples/s of a step, {OURS} / {name}", f"{v:.3f} ×", "") for name, v in faster.items()]
    rows += [(f"{head}: a batch alone / a step, {name}", f"{v:.2%}", "") for name, v in share.items()]
    rows += [(f"rows/s of the batches alone, {name}", f"{v:,.0f}", "") for name, v in rates.items()]
    stored = args.dim * 2 + args.length * 2
    rows += [
        (f"memory of a row of {stored:,} bytes, {name}", f"{size:,.0f} bytes", "") for name, size in memory.items()
    ]
    return rows


def _loaders() -> dict[str, Callable[..., Iterable]]:
    """By name, what opens the batches of one pass after the other."""

    def ours(cache: EmbeddingCache, ids: np.ndarray, _: SailRows | None, args: argparse.Namespace) -> CacheLoader:
        return CacheLoader(cache, ids, batch_size=args.batch, seed=0, pin_memory=args.device == "cuda")

    def theirs(workers: int) -> Callable[..., DataLoader]:
        def open_batches(_: EmbeddingCache, ids: np.ndarray, held: SailRows, args: argparse.Namespace) -> DataLoader:
            return DataLoader(
                held,
                batch_size=args.batch,
                shuffle=True,
                drop_last=True,
                num_workers=workers,
                collate_fn=_padded,
                pin_memory=args.device == "cuda",
            )

        return open_batches

    return {OURS: ours} | {f"SAIL's, {workers} workers": theirs(workers) for workers in WORKERS}


def _padded(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """SAIL's collate function."""
    texts, images = zip(*pairs, strict=True)
    return {"ids": pad_sequence(list(texts), batch_first=True), "image": pad_sequence(list(images), batch_first=True)}


def _steps(loaders: dict[str, Callable[[], Iterable]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of `--steps` steps on each kind of batches, by turns; opening them and the first batch do not count."""
    model = Model(args).to(args.device)
    optimizer = build_optimizer(model, OptimConfig(), {})
    inside: dict[str, list[float]] = {name: [] for name in loaders}

    def turn(name: str) -> None:
        with closing(_endless(loaders[name]())) as batches:
            next(batches)
            begun = time.perf_counter()
            for _ in range(args.steps):
                _step(model, optimizer, next(batches), args)
            if args.device == "cuda":
                torch.cuda.synchronize()
            inside[name].append(time.perf_counter() - begun)

    interleaved({name: (lambda name=name: turn(name)) for name in loaders}, args.repeats)
    return {name: taken[1:] for name, taken in inside.items()}


def _step(model: Model, optimizer: torch.optim.Optimizer, batch: dict, args: argparse.Namespace) -> None:
    image, ids = (batch[name].to(args.device, non_blocking=True) for name in ("image", "ids"))
    micro = args.micro_batch or args.batch
    with autocast(args):
        *parts, last = ids.long().split(micro)
        embedded = [*(checkpoint(model.tower, part, use_reentrant=False) for part in parts), model.tower(last)]
    zimg, ztxt = (F.normalize(rows.float(), dim=1) for rows in (image, torch.cat(embedded)))
    if args.device == "cuda":
        zimg, ztxt = zimg.bfloat16(), ztxt.bfloat16()
    sigmoid_loss(zimg, ztxt, model.log_scale.exp(), model.logit_bias).backward()
    nn.utils.clip_grad_norm_(model.parameters(), OptimConfig.clip)
    optimizer.step()
    optimizer.zero_grad()


def _endless(batches: Iterable) -> Iterator[dict]:
    while True:
        yield from batches


def _a_pass(batches: Iterable) -> None:
    for _ in batches:
        pass


def _token_ids(folder: Path, cache: EmbeddingCache, args: argparse.Namespace) -> np.ndarray:
    return token_ids(cache, load_tokenizer(str(folder / "tokenizer"), TokenizerConfig(length=args.length)))


def _bytes_per_row(folder: Path, args: argparse.Namespace, cache: EmbeddingCache) -> dict[str, float]:
    """By name, what all rows take more than half of them; each is measured in a process of its own."""
    half = write_cache(folder, args, dim=cache.dim, count=len(cache) // 2)
    for some in (half, cache):
        _token_ids(folder, some, args)  # not in the processes that are measured: it takes memory of its own
    bytes_per_row = {}
    for name in _loaders():
        taken = []
        for some in (half, cache):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                taken.append(pool.submit(_bytes_of_a_pass, name, folder, str(some.path), args).result())
        bytes_per_row[name] = (taken[1] - taken[0]) / (len(cache) - len(half))
    return bytes_per_row


def _bytes_of_a_pass(name: str, folder: Path, path: str, args: argparse.Namespace) -> int:
    """Bytes of this process and its workers at the end of a pass."""
    cache = EmbeddingCache(path)
    ids = _token_ids(folder, cache, args)
    batches = _loaders()[name](cache, ids, None if name == OURS else SailRows(cache, ids), args)
    last = len(batches)
    for number, _ in enumerate(batches, 1):
        if number == last:  # workers end with the pass
            workers = [child.pid for child in multiprocessing.active_children()]
            return _own_bytes([os.getpid(), *workers])
    raise AssertionError("there was no batch")


def _own_bytes(processes: list[int | None]) -> int:
    """Anonymous memory of the processes, what they share counted once."""
    total = 0
    for process in processes:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
        total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))
    return total
