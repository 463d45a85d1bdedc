"""Checkpoints that a kill cannot harm: when they are written, and how.

A run's folder `checkpoints` holds `last.ckpt`, `previous.ckpt`, the one before, and the weights that train.keep_every
keeps, from which no training resumes. Knows Lightning's trainer, but not what a checkpoint holds: that is
`SigLiT.on_save_checkpoint` (module.py) and `EpochLoader.state_dict` (data/epoch_loader.py), beside Lightning's own
entries.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from siglit.cache import CacheError
from siglit.loss.agreement import LateGather, disagreement
from siglit.runs.checkpoints import LAST, PREVIOUS, kept, kept_after
from siglit.runtime.files import atomic_write
from siglit.runtime.signals import Signals
from siglit.training.lightning_internals import mark_step_as_validated, validate_after_this_step


class Stopped(Exception):  # noqa: N818
    """A signal came and the run was saved at the end of its step. Passes through Lightning to `siglit.train`."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file and renames it when it is whole; the last one becomes `previous`.

    A kill at any moment leaves a whole last checkpoint under one of the two names, if there was one before. Lightning's
    own would first copy it in memory and then in the system's folder for temporary files.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write `checkpoint` as `path`.

        Raises:
            OSError: the file cannot be written, as on a full disk; the files that were there are unchanged.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_write(path, keep=path.with_name(PREVIOUS) if path.name == LAST else None) as file:
                torch.save(checkpoint, file)
        except Exception as error:
            cause = _os_error(error)
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror, str(path)) from error


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind torch's, which is about its archive and does not mention the disk."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class CheckpointSaver(Checkpoint):
    """Saves every so many steps, at the end, and after a signal; all ranks together.

    A step ends without waiting for the other ranks: where there are several, they learn of a signal at the end of the
    next step or of a validation before it, and save and stop there.

    For Lightning a step is over once its row is logged and its validation done. Only the hooks around validation run
    after the row is logged, so every save happens there: a resumed run has all rows up to its step, and logs all later
    ones. The weights that are kept are saved before, at the end of the batch: where there is a last checkpoint of a
    step, there are also the kept weights of it and of all steps before.
    """

    def __init__(
        self,
        path: Path,
        every: int,
        total_steps: int,
        signals: Signals,
        *,
        keep_every: int,
        check_finite: Callable[[pl.Trainer], None],
    ):
        """Prepare to save.

        Args:
            path: of the last checkpoint.
            every: steps between two validations, and so between two checkpoints.
            total_steps: after these, the last checkpoint is saved.
            signals: where a signal to stop is noted.
            keep_every: steps between two files of weights that are kept, the start and the end included; 0: none.
            check_finite: raises if the weights are not fit to be kept.
        """
        self._path, self._every, self._total, self._signals = path, every, total_steps, signals
        self._keep_every, self._check_finite = keep_every, check_finite
        self._stopping = False
        self._signals_of_ranks = LateGather()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let a signal wait for the end of its step from here on; keep the initial weights of a new run."""
        self._signals.install()  # Lightning has just put its own handler of SIGTERM in place, which calls collectives
        self._signals.hold = True
        if trainer.is_global_zero:
            for path in kept_after(self._path.parent, trainer.global_step):
                path.unlink()  # as metrics.csv loses its later rows: this run comes to those steps again, or never
        if self._keep_every and trainer.global_step == 0:
            self._keep(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Keep the weights of every so many steps, and stop if a signal came.

        A signal to this process, or where there are several, to any of them by the step before.
        """
        at_end = trainer.global_step == self._total
        if self._keep_every and (trainer.global_step % self._keep_every == 0 or at_end):
            self._keep(trainer, pl_module)
        self._note_signals(trainer, pl_module)
        if self._stopping or at_end:
            validate_after_this_step(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save and stop before a validation that was started for this alone."""
        if self._stopping and trainer.global_step % self._every and trainer.global_step != self._total:
            self._save(trainer, pl_module)
            raise Stopped

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; then stop if a signal came and steps are left."""
        self._save(trainer, pl_module)
        self._note_signals(trainer, pl_module, wait=True)  # saving has waited for the other ranks already
        if self._stopping and trainer.global_step != self._total:
            raise Stopped

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        mark_step_as_validated(checkpoint)

    def _note_signals(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, wait: bool = False) -> None:
        received = len(self._signals.received) > 0
        if trainer.world_size == 1:
            self._stopping |= received
            return
        of_ranks = [self._signals_of_ranks([received], pl_module.device)]
        if wait:
            of_ranks.append(self._signals_of_ranks.last())
        self._stopping |= any([1] in rows for rows in of_ranks if rows is not None)

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_data(trainer, pl_module)
        self._check_finite(trainer)  # for weights alone Lightning does not call callbacks, which check them otherwise
        trainer.save_checkpoint(kept(self._path.parent, trainer.global_step), weights_only=True)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_data(trainer, pl_module)
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self._path)

    def _check_data(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        problem = None
        try:
            # What was learned from bytes that are not the cache's must not be kept.
            trainer.datamodule.check_unchanged()  # type: ignore[attr-defined]
        except CacheError as error:
            problem = error
        # One rank may have seen what the others have not, and all of them take part in saving.
        text = str(problem or "its data is unchanged")
        of_ranks = disagreement(text, problem is not None, None, pl_module.device) if trainer.world_size > 1 else None
        if problem is not None or of_ranks is not None:
            raise problem or CacheError(str(of_ranks))
