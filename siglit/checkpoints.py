"""Checkpoints that a kill cannot harm: when they are written, how, and which one a run goes on from.

A run's folder `checkpoints` holds `last.ckpt` and `previous.ckpt`, the one before. Knows Lightning's trainer; what is
in a checkpoint is the module's and the loader's affair.
"""

import contextlib
import errno
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from siglit.errors import UserError
from siglit.files import atomic_write, remove_leftovers
from siglit.stopping import Signals

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


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


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None where it has none; says so if it is not the last one.

    Every byte is read: torch's files are zip archives with a checksum for each member.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    damaged: list[Path] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        if _is_whole(path):
            if damaged:
                print(f"{damaged[0]} is damaged; {path.name}, the checkpoint before it, is used", file=sys.stderr)
            return path
        damaged.append(path)
    if damaged:
        raise UserError(
            f"{' and '.join(map(str, damaged))} {'are' if damaged[1:] else 'is'} damaged and there is no other "
            "checkpoint; restore one, or train anew with another --output_dir"
        )
    return None


def prepare(folder: Path) -> Path | None:
    """Make the folder ready to be written to, and return what `newest` does, under the name `last.ckpt`.

    For the first process alone, before any checkpoint is written: a damaged last one must not take the place of the
    one before.

    Raises:
        UserError: all checkpoints are damaged.
    """
    remove_leftovers(folder, LAST)
    path = newest(folder)
    if path is not None and path.name == PREVIOUS:
        os.replace(path, folder / LAST)
    return path and folder / LAST


def exist(folder: Path) -> bool:
    """Tell whether there is a checkpoint, whole or not; right also while another process runs `prepare`."""
    return (folder / PREVIOUS).exists() or (folder / LAST).exists()


@contextlib.contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """Say of a full disk that the work has failed, not the input, and how to go on; which file comes first is chance.

    Args:
        folder: of the run, which holds `checkpoints`.

    Raises:
        RuntimeError: the disk or a quota is full, or a file is larger than it may become.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        kept = exist(folder / "checkpoints")
        raise RuntimeError(
            f"{error.filename or folder}: {error.strerror}; make room, then "
            + ("go on with --resume from the last checkpoint, which is whole" if kept else "train again")
        ) from error


def steps_taken(path: Path) -> int:
    """Optimiser steps of a whole checkpoint, read without its tensors."""
    return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"])


def trained_as(path: Path) -> dict[str, Any] | None:
    """The experiment that a checkpoint was trained as, in JSON's types; None where it does not say or is damaged."""
    try:
        experiment = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["siglit"].get("experiment")
    except Exception:  # damage takes many shapes, and is for `newest` to tell of
        return None
    return experiment if isinstance(experiment, dict) else None


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None and steps_taken(path) >= 0
    except Exception:  # damage to the directory of the archive takes many shapes, and torch reads it in its own way
        return False


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
        self._stopping = trainer.strategy.reduce_boolean_decision(bool(self._signals.came), all=False)
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
