"""`siglit train`: trains the text tower on the cache, or both towers on images.

Sets up Lightning and the run's folder; what is trained is `siglit.training.module`.
"""

import contextlib
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning.pytorch as pl

from siglit.cache import CacheError, exclusive
from siglit.config import Experiment
from siglit.errors import UserError
from siglit.runs import checkpoints, resume
from siglit.runs.folder import add_to_summary, output_dir, read_run_summary
from siglit.runs.launch import (
    check_accelerator,
    check_batch_fits,
    check_batch_size,
    check_launched,
    check_slurm_tasks,
    is_first_process,
    quiet_lightning,
)
from siglit.runtime.signals import Signals, ending_with_first_process, stopping_at_signals
from siglit.training.callbacks import Record, TrainProgress
from siglit.training.checkpointing import Stopped
from siglit.training.data import TrainDataModule, open_data
from siglit.training.module import SigLiT
from siglit.training.optim import lr_multiplier, total_steps
from siglit.training.trainer import build_trainer

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to."""

    steps: int
    examples_seen: int
    seconds: float
    examples_per_second: float
    metrics: dict[str, float]
    """Last logged values, "train/loss" and "val/text_to_image/R@1" among them."""
    checkpoint: str

    def __str__(self) -> str:
        """Two lines for a person."""
        shown = sorted(name for name in self.metrics if name == "train/loss" or name.startswith("val/"))
        told = ", ".join(f"{name} {self.metrics[name]:.4g}" for name in shown)
        return (
            f"trained {self.steps:,} steps on {self.examples_seen:,} pairs in {self.seconds:.0f} s "
            f"({self.examples_per_second:,.0f} pairs/s): {self.checkpoint}\n{told}"
        )


def train(experiment: Experiment) -> TrainResult:
    """Train as the experiment says and write checkpoints, metrics.csv and summary.json into the run's folder.

    SIGTERM and Ctrl-C end the run once the step is done and saved, before the first step at once; a second one at once.

    Args:
        experiment: what to train.

    Raises:
        UserError: caches, tokenizer, settings or the checkpoints to go on from are not fit to train on; another process
            trains in the run's folder; resumed, the training curve would change.
        RuntimeError: the loss or the weights are not finite any more, or the disk is full.
        KeyboardInterrupt: a signal came; `siglit.stopping.Terminated` for SIGTERM.
    """
    quiet_lightning()
    first = is_first_process()
    with stopping_at_signals() as signals, ending_with_first_process(first):
        data, steps = _open(experiment)
        folder = output_dir(experiment)
        with checkpoints.naming_a_full_disk(folder), contextlib.ExitStack() as stack:
            if first:
                try:
                    stack.enter_context(exclusive(folder))
                except CacheError as error:
                    raise UserError(str(error)) from None
            return _run(experiment, data, steps, folder, signals)


def _open(experiment: Experiment) -> tuple[TrainDataModule, int]:
    """The data and the number of steps; nothing is written yet."""
    train = experiment.train
    check_batch_size(train)
    check_accelerator("train.accelerator", train.accelerator)
    check_launched("train.nodes", train.nodes)
    check_slurm_tasks("train", train.devices, train.nodes)
    data = open_data(experiment)
    check_batch_fits(train, data.count)
    steps = total_steps(train, data.count)
    lr_multiplier(0, experiment.optim, steps, train.batch_size)  # raises before anything is made
    return data, steps


def _run(experiment: Experiment, data: TrainDataModule, steps: int, folder: Path, signals: Signals) -> TrainResult:
    last = folder / "checkpoints" / checkpoints.LAST
    resumed, taken_before = _find_resume_checkpoint(experiment, folder)
    record = Record(folder, experiment)
    pl.seed_everything(experiment.seed, verbose=False)
    module = SigLiT(experiment, steps)
    trainer = build_trainer(experiment, folder, steps, taken_before, signals, record)
    begun = time.monotonic()
    _fit(trainer, module, data, last if resumed else None, signals)
    seconds = time.monotonic() - begun
    taken = trainer.global_step
    progress = next(c for c in trainer.callbacks if isinstance(c, TrainProgress))  # type: ignore[attr-defined]
    if taken > steps:
        raise UserError(f"{last} has taken {taken} steps, more than the {steps} asked for; choose another --output_dir")
    if not (folder / resume.RECORD).exists():
        record.keep(trainer)  # also of a run that had come to its end before
    earlier = read_run_summary(experiment).get("train")
    if progress.first_step in (None, taken) and earlier:
        return TrainResult(**earlier)
    result = TrainResult(
        steps=taken,
        examples_seen=taken * experiment.train.batch_size,
        seconds=round(seconds, 2),
        examples_per_second=round(progress.rate, 1),
        metrics={k: float(v) for k, v in trainer.logged_metrics.items()},
        checkpoint=str(last),
    )
    if trainer.is_global_zero:
        add_to_summary(experiment, "train", asdict(result))
    return result


def _find_resume_checkpoint(experiment: Experiment, folder: Path) -> tuple[bool, int]:
    """Whether there is a checkpoint to go on from, and its step as far as the first process needs to know it.

    All ranks look, and are refused together: one alone would leave the others waiting. The first one repairs and tells.

    Raises:
        UserError: the run is not to be resumed but has checkpoints, all of them are damaged, or the training curve
            would change.
    """
    kept = folder / "checkpoints"
    first = is_first_process()
    wanted = experiment.train.resume or int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    if checkpoints.exist(kept) and not wanted:
        raise UserError(
            f"{folder} holds the checkpoints of an earlier run; continue it with --resume (or --train.resume true), "
            "or choose another --output_dir"
        )
    path = checkpoints.prepare(kept) if first else kept / checkpoints.LAST
    if path is None:
        if wanted:
            _logger.info(f"{kept} holds no checkpoint: training begins at the first step")
        return False, 0
    if first or path.exists():
        resume.check_resumed(folder, checkpoints.trained_as(path), experiment, quiet=not first)
    return (True, checkpoints.steps_taken(path)) if first else (wanted and checkpoints.exist(kept), 0)


def _fit(trainer: pl.Trainer, module: SigLiT, data: TrainDataModule, start: Path | None, signals: Signals) -> None:
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(start) if start else None, weights_only=True)
    except Stopped:
        if int(os.environ.get("LOCAL_RANK", "0")) != 0:
            # Lightning kills the first process of a machine when one that it started there fails.
            sys.exit(0)
        told = f"stopped at step {trainer.global_step:,} of {trainer.max_steps:,}; go on with --resume"
        raise signals.exception(told) from None
    except SystemExit as stop:  # how Lightning leaves after a signal that came before the first step
        raise (signals.exception() if trainer.interrupted else stop) from stop
    finally:
        signals.hold = False
        # Lightning does so only at the end of a whole run; workers that are at work then keep the program waiting.
        data.teardown("fit")
