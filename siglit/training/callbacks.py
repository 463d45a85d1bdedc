"""Callbacks of training: the seed of a step, the record of the experiment, and progress."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from typing_extensions import override

from siglit.config import Experiment
from siglit.runs import resume
from siglit.runtime.progress import Meter
from siglit.training.lightning_internals import is_logged_step

_logger = logging.getLogger(__name__)


class StepSeed(pl.Callback):
    """Draws what is random in a step, such as dropout, from (seed, step, rank), so no random state has to be saved."""

    def __init__(self, seed: int):
        """Take the experiment's seed."""
        self._seed = seed

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Seed the CPU and all devices."""
        sequence = np.random.SeedSequence((self._seed, trainer.global_step, trainer.global_rank))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


class ExperimentRecord(pl.Callback):
    """Writes the experiment into the run's folder once training starts; a run that is refused keeps the earlier one."""

    def __init__(self, folder: Path, experiment: Experiment):
        """Take the run's folder and the experiment."""
        self._folder, self._experiment = folder, experiment
        self._written = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it: all checks are over by now, those of the checkpoint included."""
        self.write(trainer)

    def write(self, trainer: pl.Trainer) -> None:
        """Write the experiment, once and on the first rank."""
        if trainer.is_global_zero and not self._written:
            resume.write_record(self._folder, self._experiment)
            self._written = True


class TrainProgress(pl.Callback):
    """Shows examples, examples/s and the time left.

    Attributes:
        rate: examples/s of the whole training, once it has ended.
        first_step: steps that were taken before this training began; None until then.
    """

    def __init__(self, batch_size: int, total_steps: int):
        """Count in examples of the global batch."""
        self._batch_size, self._total_steps = batch_size, total_steps
        self._meter: Meter | None = None
        self._note = ""
        self.rate = 0.0
        self.first_step: int | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how the rows are shuffled; start counting at the step of the checkpoint, if there is one."""
        if trainer.is_global_zero:
            _logger.info(trainer.datamodule.shuffle_message())  # type: ignore[attr-defined]
        self.first_step = trainer.global_step
        self._meter = Meter(
            "training",
            self._total_steps * self._batch_size,
            "examples",
            start=trainer.global_step * self._batch_size,
            quiet=not trainer.is_global_zero,
        ).__enter__()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; the loss is read only on a logged step, because reading it waits for the device."""
        if is_logged_step(trainer):
            self._read_metrics(trainer)
        self._show(trainer, self._batch_size)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the validation beside its step; it comes after `on_train_batch_end` of that step."""
        self._read_metrics(trainer)
        self._show(trainer, 0)

    def _read_metrics(self, trainer: pl.Trainer) -> None:
        shown = {k: v for k, v in trainer.logged_metrics.items() if k in ("train/loss", "val/text_to_image/R@1")}
        self._note = "  ".join(f"{k} {float(v):.3g}" for k, v in shown.items())

    def _show(self, trainer: pl.Trainer, examples: int) -> None:
        assert self._meter is not None
        self._meter.advance(examples, f"step {trainer.global_step}  {self._note}")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the rate; a run that a signal ends early is shown without a last line."""
        self._close(None if trainer.global_step >= self._total_steps else KeyboardInterrupt)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the terminal."""
        self._close(type(exception))

    def _close(self, kind: type[BaseException] | None) -> None:
        if self._meter is not None:
            self.rate = self._meter.rate
            self._meter.__exit__(kind, None, None)
            self._meter = None
