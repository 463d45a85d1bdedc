"""A real `siglit train` on a generated cache, within which other contenders take their turns.

Knows nothing of the contenders. One run lasts for the whole measurement: what is timed is its steady state.
Shapes: N rows of the cache, D embedding width, B pairs of a step, L tokens.
"""

import argparse
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import siglit
from siglit.cache import EmbeddingCache, finish, write_shard
from siglit.config import (
    CacheConfig,
    DataConfig,
    Experiment,
    ImageTowerConfig,
    OptimConfig,
    SourceSpec,
    TextTowerConfig,
    TokenizerConfig,
    TrainConfig,
)
from siglit.training.module import SigLiT

VOCABULARY = 32_000
SIGLIT = "siglit train"
Contenders = Mapping[str, Callable[[], object]]
_SPECIAL = ("<pad>", "</s>", "<unk>")
_ROWS_OF_A_SHARD = 65_536
_LOG_EVERY = TrainConfig.log_every


class _Enough(BaseException):
    """Ends the run; not an Exception, so that no handler of errors catches it."""


def train_until(experiment: Experiment, after_step: Callable[[SigLiT], bool]) -> None:
    """Run `siglit train` until `after_step`, which is called with the module after each step, returns True."""
    own = SigLiT.on_train_batch_end

    def then(module: SigLiT, *arguments: Any) -> None:
        own(module, *arguments)
        if after_step(module):
            raise _Enough

    with mock.patch.object(SigLiT, "on_train_batch_end", then):
        try:
            siglit.train(experiment)
        except _Enough:
            return
    raise AssertionError("the run ended before it was enough")


def in_turns(
    experiment: Experiment, make: Callable[[SigLiT], Contenders], *, steps: int, repeats: int
) -> dict[str, list[float]]:
    """Time `siglit train`, and the others each time it has taken `steps` steps.

    A turn of the run lasts from the end of one step to the end of a later one, with everything that lies between. The
    first turn of all does not count.

    Args:
        experiment: what to train; the run ends once all turns are taken.
        make: called once, with the module in training, for those that are timed beside it, by name.
        steps: of a turn of the run.
        repeats: turns.

    Returns:
        Seconds by name, one for each turn.
    """
    seconds: dict[str, list[float]] = {SIGLIT: []}
    others: dict[str, Callable[[], object]] = {}
    taken, begun = 0, 0.0

    def after_step(module: SigLiT) -> bool:
        nonlocal taken, begun
        taken += 1
        turn, rest = divmod(taken, steps)
        if rest:
            return False
        if turn == 1:
            others.update(make(module))
            seconds.update({name: [] for name in others})
        else:
            seconds[SIGLIT].append(_now() - begun)
        order = list(others)
        random.Random(turn).shuffle(order)
        for name in order:
            begun = _now()
            others[name]()
            if turn > 1:
                seconds[name].append(_now() - begun)
        begun = _now()
        return turn > repeats

    train_until(experiment, after_step)
    return seconds


def _now() -> float:
    """Seconds of a clock, after the device has finished its queue."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def recipe(folder: Path, args: argparse.Namespace, *, size: str, cache: EmbeddingCache, optimizer: str) -> Experiment:
    """Return the experiment of a locked training on the cache with a text tower of this size."""
    cuda = args.device == "cuda"
    return Experiment(
        data=DataConfig(train=SourceSpec(format="csv", path="unused: the cache is imported")),
        output_dir=str(folder / f"run-{size}-{optimizer}-{cache.dim}"),
        image_tower=ImageTowerConfig(model="random"),
        cache=CacheConfig(path=str(Path(cache.path).parent)),
        tokenizer=TokenizerConfig(path=str(folder / "tokenizer"), length=args.length),
        text_tower=TextTowerConfig(size=size),
        optim=OptimConfig(name=optimizer),
        train=TrainConfig(
            batch_size=args.batch,
            micro_batch_size=args.micro_batch or None,
            # More than are taken, see `in_turns`: the end of a run writes a checkpoint.
            steps=args.steps * (args.repeats + 2),
            accelerator=args.device,
            compile=cuda,
            precision="bf16-mixed" if cuda else "32-true",
            # Otherwise a turn of fewer steps would include no logging.
            log_every=min(_LOG_EVERY, args.steps),
            val_every=0,
        ),
    )


def write_cache(folder: Path, args: argparse.Namespace, *, dim: int, count: int) -> EmbeddingCache:
    """Write `count` random rows with captions of random words, and the tokenizer that makes a token of each word.

    Files that an earlier call has written are reused.
    """
    cache, rng = folder / f"cache-{count}-{dim}" / "train", np.random.default_rng(0)
    if cache.exists():
        return EmbeddingCache(cache)
    fingerprint = {"image_tower": {"model": "random", "imported": True}, "source": "benchmarks.train"}
    starts = range(0, count, _ROWS_OF_A_SHARD)
    for number, start in enumerate(starts):
        rows = range(start, min(start + _ROWS_OF_A_SHARD, count))
        words = rng.integers(0, VOCABULARY - len(_SPECIAL), (len(rows), args.length))
        write_shard(
            cache,
            number,
            embeddings=rng.standard_normal((len(rows), dim), np.float32),
            keys=[str(row) for row in rows],
            captions=[[" ".join(map(str, caption))] for caption in words.tolist()],
            fingerprint=fingerprint,
        )
    finish(cache, len(starts), fingerprint)
    if not (folder / "tokenizer").exists():
        _write_tokenizer(folder / "tokenizer")
    return EmbeddingCache(cache)


def _write_tokenizer(folder: Path) -> None:
    """A word is a token, so that the vocabulary has its full size without a corpus to learn it from."""
    words = (*_SPECIAL, *map(str, range(VOCABULARY - len(_SPECIAL))))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("pad_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
