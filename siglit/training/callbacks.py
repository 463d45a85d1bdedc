"""Callbacks of training: the seed of a step, the record of the experiment, and progress."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from siglit.config import Experiment
from siglit.runs import resume
from siglit.runtime.progress import Meter
from siglit.training.monitor import is_logged

_logger = logging.getLogger(__name__)


class StepSeed(pl.Callback):
    """Draws what is random in a step, such as dropout, from (seed, step, rank) alone: nothing of it is to be saved."""

    def __init__(self, seed: int):
        """Take the experiment's seed."""
        self._seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Seed the CPU and all devices."""
        drawn = np.random.SeedSequence((self._seed, trainer.global_step, trainer.global_rank))
        torch.manual_seed(int(drawn.generate_state(1, np.uint64)[0]))


class Record(pl.Callback):
    """Leaves the experiment in the run's folder once training begins: a run that is refused leaves the earlier one."""

    def __init__(self, folder: Path, experiment: Experiment):
        """Take the run's folder and the experiment."""
        self._folder, self._experiment = folder, experiment
        self._written = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything that may be refused has been read by now, the checkpoint included."""
        self.keep(trainer)

    def keep(self, trainer: pl.Trainer) -> None:
        """Write it, once."""
        if trainer.is_global_zero and not self._written:
            resume.write_record(self._folder, self._experiment)
            self._written = True


class TrainProgress(pl.Callback):
    """Shows examples, examples/s and the time left."""

    def __init__(self, batch_size: int, total_steps: int):
        """Count in examples of the global batch."""
        self._batch_size, self._total_steps = batch_size, total_steps
        self._meter: Meter | None = None
        self._note = ""
        self.rate = 0.0
        self.first_step: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how the rows are shuffled; begin at the step the run goes on from."""
        if trainer.is_global_zero:
            _logger.info(trainer.datamodule.shuffle_message())  # type: ignore[attr-defined]
        self.first_step = trainer.global_step
        done = trainer.global_step * self._batch_size
        self._meter = Meter(
            "training",
            self._total_steps * self._batch_size,
            "examples",
            start=done,
            quiet=not trainer.is_global_zero,
        ).__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; the loss is read only on a step that is logged, for reading it waits for the device."""
        if is_logged(trainer):
            self._read(trainer)
        self._show(trainer, self._batch_size)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the validation beside the step that it belongs to; it comes after the end of that step's batch."""
        self._read(trainer)
        self._show(trainer, 0)

    def _read(self, trainer: pl.Trainer) -> None:
        shown = {k: v for k, v in trainer.logged_metrics.items() if k in ("train/loss", "val/text_to_image/R@1")}
        self._note = "  ".join(f"{k} {float(v):.3g}" for k, v in shown.items())

    def _show(self, trainer: pl.Trainer, examples: int) -> None:
        assert self._meter is not None
        self._meter.advance(examples, f"step {trainer.global_step}  {self._note}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the rate; a run that a signal ends has not come to its end."""
        self._close(None if trainer.global_step >= self._total_steps else KeyboardInterrupt)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the terminal right again."""
        self._close(type(exception))

    def _close(self, kind: type[BaseException] | None) -> None:
        if self._meter is not None:
            self.rate = self._meter.rate
            self._meter.__exit__(kind, None, None)
            self._meter = None
