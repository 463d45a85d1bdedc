"""How fast this machine trains: a few real training steps on random pairs.

Knows neither data nor files; reading and the exchange between devices are left out.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch

from siglit.config import Experiment
from siglit.data.epoch_loader import Batch
from siglit.planning.memory import RandomData
from siglit.runtime.provenance import processor
from siglit.training.module import SigLiT

_LONG_ENOUGH = 1.0
"""Seconds of a step from which more pairs would tell no more."""
_SMALLEST = 4


@dataclass(frozen=True)
class Probe:
    """A few training steps on random pairs on this machine."""

    hardware: str
    pairs: int
    """Of the last step, which is the one that counts."""
    seconds_per_pair: float
    """Of forward and backward."""
    optimizer_seconds: float
    """Of an optimiser step, clipping included."""

    def examples_per_second(self, pairs: int) -> float:
        """Rate of a step of so many pairs: the optimiser's share shrinks as they grow."""
        return pairs / (self.optimizer_seconds + self.seconds_per_pair * pairs)


def measure_throughput(experiment: Experiment, precision: str, passed: int) -> Probe:
    """Time training steps of growing size on one device, until one takes long enough to tell.

    Args:
        experiment: what is to be trained; train.devices share its batch.
        precision: Lightning's.
        passed: pairs in one pass of the towers.
    """
    train = experiment.train
    pairs = train.batch_size // train.devices
    micro = passed if passed < pairs else None
    alone = replace(train, devices=1, nodes=1, micro_batch_size=micro, strategy="auto")
    experiment = replace(experiment, train=alone)
    data = _Growing(experiment, min(pairs, 2 * passed))
    watch = _Stopwatch()
    accelerator = "cpu" if train.accelerator == "cpu" or not torch.cuda.is_available() else "cuda"
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        limit_val_batches=0,
        gradient_clip_val=experiment.optim.clip or None,
        use_distributed_sampler=False,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with torch.random.fork_rng():
        trainer.fit(SigLiT(experiment, 10_000), datamodule=data)
    # A part that fits as a whole was not computed twice, as it will be.
    again = 4 / 3 if micro is not None and watch.pairs <= micro else 1.0
    return Probe(_hardware(accelerator), watch.pairs, watch.towers / watch.pairs * again, watch.optimizer)


class _Growing(RandomData):
    """Batches of random pairs, each size twice: what the first of a size has to set up does not count."""

    def __init__(self, experiment: Experiment, most: int):
        super().__init__(experiment)
        self._sizes = [min(_SMALLEST, most)]
        while self._sizes[-1] * 2 <= most:
            self._sizes.append(self._sizes[-1] * 2)

    def train_dataloader(self) -> Iterator[Batch]:
        """All sizes; `_Stopwatch` does not wait for the end."""
        return (self.batch(pairs) for pairs in self._sizes for _ in range(2))

    def val_dataloader(self) -> list[int]:
        """None."""
        return []


class _Stopwatch(pl.Callback):
    """Seconds of the faster of the two latest steps: of forward and backward, and of the optimiser."""

    def __init__(self) -> None:
        self.pairs = 0
        self.towers = self.optimizer = 0.0
        self._begun = self._middle = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, _: int) -> None:
        """Begin; a new size forgets the one before."""
        if len(batch["ids"]) != self.pairs:
            self.pairs, self.towers, self.optimizer = len(batch["ids"]), 0.0, 0.0
        self._begun = _now()

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Forward and backward are done."""
        self._middle = _now()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """So is the step."""
        towers, optimizer = self._middle - self._begun, _now() - self._middle
        if not self.towers:
            self.towers, self.optimizer = towers, optimizer
            return
        self.towers, self.optimizer = min(self.towers, towers), min(self.optimizer, optimizer)
        trainer.should_stop = self.towers >= _LONG_ENOUGH


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _hardware(accelerator: str) -> str:
    if accelerator == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads of {processor()}"
