"""Checkpoints that a kill cannot harm: when they are written, how, and which one a run goes on from.

A run's folder `checkpoints` holds `last.ckpt` and `previous.ckpt`, the one before. Knows Lightning's trainer; what is
in a checkpoint is the module's and the loader's affair.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from siglit.runs.checkpoints import PREVIOUS
from siglit.runtime.files import atomic_write
from siglit.runtime.signals import Signals


class Stopped(Exception):  # noqa: N818
    """A signal came and the run was saved at the end of its step; not for Lightning, which only has to let it pass."""


class AtomicFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its name, and gives it the name once it is whole; the one before becomes `previous`.

    A kill at any moment leaves a whole checkpoint under one of the two names, if there was one before. Lightning's own
    would first be copied in memory and then in the system's folder for temporary files.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write `checkpoint` as `path`.

        Raises:
            OSError: the disk is full, or refuses for another reason; the files that were there are as before.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_write(path, keep=path.with_name(PREVIOUS)) as file:
                torch.save(checkpoint, file)
        except Exception as error:
            refused = _refusal(error)
            if refused is None:
                raise
            raise OSError(refused.errno, refused.strerror, str(path)) from error


def _refusal(error: BaseException | None) -> OSError | None:
    """The disk's own error: torch puts one of its archive in its place, which says nothing of a disk."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class Checkpoints(Checkpoint):
    """Saves every so many steps, at the end, and at the end of a step in which a signal came; all ranks together.

    A step is over for Lightning once its row is logged and its validation done; only the hooks around validation lie
    behind the first, so every save is made there. A resumed run then has all rows up to its step and makes all later.
    """

    def __init__(self, path: Path, every: int, total_steps: int, signals: Signals):
        """Save as `path` when Lightning validates, which it does every `every` steps, and after `total_steps`."""
        self._path, self._every, self._total, self._signals = path, every, total_steps, signals
        self._stopping = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on a signal waits for the end of its step."""
        self._signals.install()  # Lightning has put its own handler of SIGTERM first, which calls collectives
        self._signals.hold = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Let the ranks agree on whether to stop."""
        self._stopping = trainer.strategy.reduce_boolean_decision(bool(self._signals.received), all=False)
        if self._stopping or trainer.global_step == self._total:
            # Not should_stop, which would also log a row that an undisturbed run has not.
            trainer.val_check_batch = 1

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save and stop, where the step has no validation of its own."""
        if self._stopping and trainer.global_step % self._every and trainer.global_step != self._total:
            self._save(trainer)
            raise Stopped

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; then stop if a signal came and there is more to do."""
        self._save(trainer)
        if self._stopping and trainer.global_step != self._total:
            raise Stopped

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Describe the step as one whose validation is past, whether or not it had one: so Lightning never repeats it.

        These are the counters as they are in `on_train_batch_end`, the moment that Lightning goes on from best.
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counters in (progress["total"], progress["current"]):
            assert counters["completed"] == counters["processed"]
            counters["completed"] -= 1

    def _save(self, trainer: pl.Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self._path)
