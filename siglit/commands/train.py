"""`siglit train`: trains the text tower on the cache, or both towers on images.

Sets up Lightning and the run's folder; knows nothing of towers and losses, which are in `siglit.training.module`.
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
from siglit.models.text_tower import check_sizes
from siglit.runs import checkpoints, resume
from siglit.runs.folder import add_to_summary, ensure_folder, read_run_summary
from siglit.runs.launch import (
    check_accelerator,
    check_batch_fits,
    check_batch_size,
    check_launched,
    check_slurm_tasks,
    is_first_process,
    quiet_lightning,
)
from siglit.runtime.malloc import reusing_freed_memory
from siglit.runtime.matmul import matmul_precision
from siglit.runtime.signals import Signals, ending_with_first_process, stopping_at_signals
from siglit.runtime.text import plural
from siglit.training.callbacks import ExperimentRecord, TrainProgress
from siglit.training.checkpointing import Stopped
from siglit.training.data import TrainDataModule, open_data
from siglit.training.module import SigLiT
from siglit.training.optim import lr_multiplier, total_steps
from siglit.training.trainer import build_trainer

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a training run, as written to summary.json."""

    steps: int
    """Optimizer steps of the whole run, those before it was resumed included."""
    examples_seen: int
    """Pairs in these steps."""
    seconds: float
    """Wall-clock time since the run was started, or resumed."""
    examples_per_second: float
    """Pairs per second in this time, over all devices."""
    metrics: dict[str, float]
    """Last logged values, "train/loss" and "val/text_to_image/R@1" among them."""
    checkpoint: str
    """Path of the last checkpoint."""

    def __str__(self) -> str:
        """Two lines: steps, speed and checkpoint; loss and validation metrics."""
        recalls = {name: value for name, value in self.metrics.items() if name.startswith("val/")}
        by_depth = sorted(recalls, key=lambda name: (name.partition("@")[0], int(name.partition("@")[2])))
        shown = [f"train/loss {self.metrics['train/loss']:.4g}"] if "train/loss" in self.metrics else []
        shown += [f"{name} {100 * recalls[name]:.1f} %" for name in by_depth]
        metrics = ", ".join(shown)
        return (
            f"trained {plural(self.steps, 'step')} on {plural(self.examples_seen, 'pair')} in {self.seconds:.0f} s "
            f"({self.examples_per_second:,.0f} pairs/s): {self.checkpoint}\n{metrics}"
        )


def train(experiment: Experiment) -> TrainResult:
    """Train as the experiment says; write checkpoints, metrics.csv, experiment.yaml and summary.json into its folder.

    SIGTERM and Ctrl-C stop the run once the current step is done and saved. Before the first step, and when a second
    signal comes, they stop it at once.

    Args:
        experiment: what to train.

    Raises:
        UserError: caches, tokenizer, settings or the checkpoint to resume from do not fit the experiment; another
            process trains in the run's folder; resuming would change the training curve.
        RuntimeError: the loss or the weights are no longer finite, or the disk is full.
        KeyboardInterrupt: a signal came; for SIGTERM a `siglit.runtime.signals.Terminated`.
    """
    quiet_lightning()
    first = is_first_process()
    with stopping_at_signals() as signals, ending_with_first_process(first):
        data, steps = _open_checked(experiment)
        folder = ensure_folder(experiment.folder)
        with checkpoints.explaining_full_disk(folder), contextlib.ExitStack() as stack:
            if first:
                try:
                    stack.enter_context(exclusive(folder))
                except CacheError as error:
                    raise UserError(str(error)) from None
            stack.enter_context(matmul_precision(experiment.train.matmul_precision))
            if experiment.mode != "locked":  # with cached images there are no activations large enough to matter
                stack.enter_context(reusing_freed_memory())
            return _run(experiment, data, steps, folder, signals)


def _open_checked(experiment: Experiment) -> tuple[TrainDataModule, int]:
    """Open the data and compute the number of optimizer steps, after checks of the settings; writes nothing."""
    train = experiment.train
    check_batch_size(train)
    check_sizes(experiment.text_tower)
    check_accelerator("train", train.accelerator, train.devices)
    check_launched("train.nodes", train.nodes)
    check_slurm_tasks("train", train.devices, train.nodes)
    data = open_data(experiment)
    check_batch_fits(train, data.count)
    steps = total_steps(train, data.count)
    lr_multiplier(0, experiment.optim, steps, train.batch_size)  # raises where the schedule does not fit
    return data, steps


def _run(experiment: Experiment, data: TrainDataModule, steps: int, folder: Path, signals: Signals) -> TrainResult:
    """Train in the run's folder, which this run alone writes to."""
    last = folder / "checkpoints" / checkpoints.LAST
    resumes, steps_before = _find_resume_checkpoint(experiment, folder)
    record = ExperimentRecord(folder, experiment)
    pl.seed_everything(experiment.seed, verbose=False)
    module = SigLiT(experiment, steps)
    trainer = build_trainer(experiment, folder, steps, steps_before, signals, record)
    start = time.monotonic()
    _fit(trainer, module, data, last if resumes else None, signals)
    seconds = time.monotonic() - start
    taken = trainer.global_step
    if taken > steps:
        raise UserError(
            f"{last} has taken {taken} steps, more than the {steps} of the experiment; choose another --output_dir"
        )
    if not (folder / resume.RECORD).exists():
        record.write(trainer)  # of a run that was complete already, but has lost its experiment.yaml
    progress = next(c for c in trainer.callbacks if isinstance(c, TrainProgress))  # type: ignore[attr-defined]
    earlier = read_run_summary(folder).get("train")
    if progress.first_step in (None, taken) and earlier:
        if trainer.is_global_zero:
            _logger.info(f"the run is complete: it has taken its {plural(taken, 'step')}; its earlier result follows")
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
        add_to_summary(folder, "train", asdict(result))
    return result


def _find_resume_checkpoint(experiment: Experiment, folder: Path) -> tuple[bool, int]:
    """Whether there is a checkpoint to resume from and, on the first process alone, how many steps it has taken.

    All ranks check, and all fail together: if one failed alone, the others would wait for it. Only the first one moves
    files and logs.

    Raises:
        UserError: the run has checkpoints but is not to be resumed, all of them are damaged, the newest is of weights
            alone, or resuming would change the training curve.
    """
    saved = folder / "checkpoints"
    first = is_first_process()
    requested = experiment.train.resume or int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    # Weights of the start alone are of a run that was stopped before its first step, which can be started again.
    if not requested and (checkpoints.exist(saved) or checkpoints.kept_after(saved, 0)):
        raise UserError(
            f"{folder} holds the checkpoints of an earlier run; continue it with --resume (or --train.resume true), "
            "or choose another --output_dir"
        )
    path = checkpoints.prepare(saved) if first else saved / checkpoints.LAST
    if path is None:
        if requested:
            _logger.info(f"{saved} holds no checkpoint: training starts at the first step")
        return False, 0
    if first or path.exists():
        checkpoints.check_resumable(path)
        resume.check_resumed(folder, checkpoints.trained_as(path), experiment, quiet=not first)
    return (True, checkpoints.steps_taken(path)) if first else (requested and checkpoints.exist(saved), 0)


def _fit(trainer: pl.Trainer, module: SigLiT, data: TrainDataModule, start: Path | None, signals: Signals) -> None:
    """Run Lightning's training, from the checkpoint `start` if there is one.

    Raises:
        KeyboardInterrupt: a signal came; the run is saved unless it came before the first step.
    """
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(start) if start else None, weights_only=True)
    except Stopped:
        if int(os.environ.get("LOCAL_RANK", "0")) != 0:
            # When a process that the first one of a machine has started fails, Lightning kills the first one.
            sys.exit(0)
        message = f"stopped at step {trainer.global_step:,} of {trainer.max_steps:,}; add --resume to continue"
        raise signals.exception(message) from None
    except SystemExit as stop:  # Lightning raises it after a signal that came before the first step
        raise (signals.exception() if trainer.interrupted else stop) from stop
    finally:
        signals.hold = False
        # Lightning does this only at the end of a complete run; workers that are busy would keep the program waiting.
        data.teardown("fit")
