"""How fast this machine trains: times a few real training steps on random pairs.

Knows neither data nor files; leaves out reading and the exchange between devices.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from siglit.config import Experiment
from siglit.data.epoch_loader import Batch
from siglit.planning.memory import RandomDataModule
from siglit.runtime.malloc import reusing_freed_memory
from siglit.runtime.matmul import matmul_precision
from siglit.runtime.provenance import processor
from siglit.runtime.text import plural
from siglit.training.module import SigLiT

_LONG_ENOUGH = 1.0
"""Seconds of a step from which more pairs would not make the measurement better."""
_SMALLEST = 4
_SCHEDULED_STEPS = 2**40
"""Length of the schedule, which changes no timing: more steps than any warm-up and cooldown together."""


@dataclass(frozen=True)
class ThroughputMeasurement:
    """The time of training steps on random pairs on this machine."""

    hardware: str
    pairs: int
    """Pairs of the largest step, which is the one that is timed."""
    seconds_per_pair: float
    """Of forward and backward."""
    optimizer_seconds: float
    """Of an optimizer step, clipping included."""

    def examples_per_second(self, pairs: int) -> float:
        """Return the rate of steps of this many pairs: the optimizer's part of a step shrinks as they grow."""
        return pairs / (self.optimizer_seconds + self.seconds_per_pair * pairs)


def measure_throughput(
    experiment: Experiment, *, precision: str, pairs: int, micro_batch_size: int
) -> ThroughputMeasurement:
    """Time training steps of growing size on one device, until one takes long enough for a stable result.

    Args:
        experiment: what is trained.
        precision: Lightning's.
        pairs: pairs per device.
        micro_batch_size: pairs in one pass of the towers; `pairs` for all.
    """
    micro = micro_batch_size if micro_batch_size < pairs else None
    # The module takes its micro-batch from the experiment.
    planned = replace(experiment, train=replace(experiment.train, micro_batch_size=micro))
    data, stopwatch = _GrowingBatches(planned, min(pairs, 2 * micro_batch_size)), _Stopwatch()
    accelerator = "cpu" if experiment.train.accelerator == "cpu" or not torch.cuda.is_available() else "cuda"
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        limit_val_batches=0,
        gradient_clip_val=experiment.optim.clip or None,
        use_distributed_sampler=False,
        callbacks=[stopwatch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    reuse = contextlib.nullcontext() if experiment.mode == "locked" else reusing_freed_memory()  # as in `siglit.train`
    with torch.random.fork_rng(), matmul_precision(experiment.train.matmul_precision), reuse:
        trainer.fit(SigLiT(planned, _SCHEDULED_STEPS), datamodule=data)
    # A batch of one micro-batch was not recomputed in backward, as a full batch will be.
    recomputation = 4 / 3 if micro is not None and stopwatch.pairs <= micro else 1.0
    return ThroughputMeasurement(
        hardware=_hardware(accelerator),
        pairs=stopwatch.pairs,
        seconds_per_pair=stopwatch.towers / stopwatch.pairs * recomputation,
        optimizer_seconds=stopwatch.optimizer,
    )


class _GrowingBatches(RandomDataModule):
    """Batches of random pairs of doubling size, each size twice: the first step of a size includes its setup."""

    def __init__(self, experiment: Experiment, largest: int):
        super().__init__(experiment)
        self._sizes = [min(_SMALLEST, largest)]
        while self._sizes[-1] * 2 <= largest:
            self._sizes.append(self._sizes[-1] * 2)

    @override
    def train_dataloader(self) -> Iterator[Batch]:
        return (self.batch(pairs) for pairs in self._sizes for _ in range(2))

    @override
    def val_dataloader(self) -> list[int]:
        return []


class _Stopwatch(pl.Callback):
    """Times forward and backward, and the optimizer; keeps the faster of the two steps of the current size.

    Attributes:
        pairs: the current size.
        towers: seconds of forward and backward.
        optimizer: seconds of the optimizer step.
    """

    def __init__(self) -> None:
        self.pairs = 0
        self.towers = self.optimizer = 0.0
        self._start = self._backward_end = 0.0

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, _: int) -> None:
        if len(batch["ids"]) != self.pairs:
            self.pairs, self.towers, self.optimizer = len(batch["ids"]), 0.0, 0.0
        self._start = _synchronized_time()

    @override
    def on_before_optimizer_step(self, *_: Any) -> None:
        self._backward_end = _synchronized_time()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        towers, optimizer = self._backward_end - self._start, _synchronized_time() - self._backward_end
        if self.towers == 0:
            self.towers, self.optimizer = towers, optimizer
            return
        self.towers, self.optimizer = min(self.towers, towers), min(self.optimizer, optimizer)
        trainer.should_stop = self.towers >= _LONG_ENOUGH


def _synchronized_time() -> float:
    """Seconds of a clock, after the GPU has finished what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _hardware(accelerator: str) -> str:
    if accelerator == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{plural(threads, 'thread')} of {processor()}"
