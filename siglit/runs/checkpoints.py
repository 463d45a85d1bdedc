"""The checkpoints in a run's folder: which one is whole, and what it says of itself.

`checkpoints/last.ckpt`, and `previous.ckpt`, the one before. How they are written is `siglit.training.checkpointing`.
"""

import contextlib
import errno
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from siglit.errors import UserError
from siglit.runtime.files import remove_leftovers

_logger = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


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
                _logger.warning(f"{damaged[0]} is damaged; {path.name}, the checkpoint before it, is used")
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
