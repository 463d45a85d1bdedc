"""The checkpoints in a run's folder: which one is undamaged, and what it records about its run.

`checkpoints/last.ckpt`, `previous.ckpt`, the one before, and such as `step-00000040.ckpt`, the kept weights of a step.
How they are written is `siglit.training.checkpointing`, what they hold `SigLiT.on_save_checkpoint` in
`siglit.training.module`.
"""

import contextlib
import errno
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from siglit.errors import UserError
from siglit.runtime.files import remove_leftovers

_logger = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
"""The checkpoints that a run resumes from."""
_KEPT = "step-*.ckpt"


def newest(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint of a run, or None where it has none; warns if it is not the last one.

    Reads every byte: torch's files are zip archives with a checksum for each member.

    Args:
        folder: `checkpoints` in the run's folder.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    damaged: list[Path] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        if is_undamaged(path):
            if damaged:
                _logger.warning(f"{damaged[0]} is damaged; {path.name}, the checkpoint before it, is used")
            return path
        damaged.append(path)
    if damaged:
        raise UserError(
            f"{' and '.join(map(str, damaged))} {'are' if damaged[1:] else 'is'} damaged and there is no other "
            "checkpoint; restore one, or train again with another --output_dir"
        )
    return None


def prepare(folder: Path) -> Path | None:
    """Remove temporary files, and return what `newest` does, renamed to `last.ckpt`.

    For the first process alone, before any checkpoint is written: a damaged `last.ckpt` must not become
    `previous.ckpt` and replace an undamaged one.

    Raises:
        UserError: all checkpoints are damaged.
    """
    for names in (LAST, _KEPT):
        remove_leftovers(folder, names)
    path = newest(folder)
    if path is not None and path.name == PREVIOUS:
        os.replace(path, folder / LAST)
    return None if path is None else folder / LAST


def exist(folder: Path) -> bool:
    """Tell whether there is a checkpoint, damaged or not; correct also while another process runs `prepare`."""
    # `prepare` renames previous to last: looking in the other order could miss both.
    return (folder / PREVIOUS).exists() or (folder / LAST).exists()


def kept(folder: Path, step: int) -> Path:
    """File of the weights that are kept of a step, see train.keep_every."""
    return folder / f"step-{step:08}.ckpt"


def kept_after(folder: Path, step: int) -> list[Path]:
    """Files of the weights that are kept of later steps."""
    numbers = ((path, re.fullmatch(r"step-([0-9]{8,})", path.stem)) for path in folder.glob(_KEPT))
    return [path for path, number in numbers if number is not None and int(number[1]) > step]


@contextlib.contextmanager
def explaining_full_disk(folder: Path) -> Iterator[None]:
    """Turn the OSError of a full disk, whichever file met it, into one that says how to continue.

    Args:
        folder: of the run, which holds `checkpoints`.

    Raises:
        RuntimeError: the disk or a quota is full, or a file exceeds the size limit.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        resumable = exist(folder / "checkpoints")
        raise RuntimeError(
            f"{error.filename or folder}: {error.strerror}; free some space, then "
            + ("add --resume to continue from the last checkpoint, which is intact" if resumable else "train again")
        ) from error


def steps_taken(path: Path) -> int:
    """Optimizer steps of an undamaged checkpoint, read without its tensors."""
    return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"])


def trained_as(path: Path) -> dict[str, Any] | None:
    """The experiment of a checkpoint, in JSON's types; None where it is not recorded or the checkpoint is damaged."""
    try:
        experiment = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["siglit"].get("experiment")
    except Exception:  # damage raises errors of many types; `newest` reports it
        return None
    return experiment if isinstance(experiment, dict) else None


def check_resumable(path: Path) -> None:
    """Refuse to continue from kept weights; a damaged checkpoint passes, because `newest` reports it.

    Raises:
        UserError: the checkpoint has no optimizer state.
    """
    try:
        resumable = "optimizer_states" in torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # damage raises errors of many types
        return
    if not resumable:
        raise UserError(
            f"{path} holds weights without optimizer state, as the files of train.keep_every do, so no training can "
            f"resume from it; restore the run's own {LAST} or {PREVIOUS}, or choose another --output_dir"
        )


def is_undamaged(path: Path) -> bool:
    """Tell whether a checkpoint's checksums are correct and torch can read it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None and steps_taken(path) >= 0
    except Exception:  # damage to the directory of the archive raises errors of many types, in zipfile and in torch
        return False
