"""`siglit train`: trains the text tower on the cache, or both towers on images.

Sets up Lightning and the run's folder; what is trained is `siglit.lightning_module`.
"""

import contextlib
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy

from siglit import checkpoints, resuming
from siglit import run as run_folder
from siglit.cache import CacheError, exclusive
from siglit.config import Experiment, TrainConfig
from siglit.data_module import TrainData, open_data
from siglit.errors import UserError
from siglit.lightning_module import SigLiT
from siglit.metrics_table import MetricsTable
from siglit.optim import rate, total_steps
from siglit.progress import Meter
from siglit.sharding import Sharded
from siglit.stopping import Signals, ending_with_first_process, stopping_at_signals
from siglit.watching import Watch, is_logged


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


def run(experiment: Experiment, as_yaml: str | None = None) -> TrainResult:
    """Train as the experiment says and write checkpoints, metrics.csv and summary.json into the run's folder.

    SIGTERM and Ctrl-C end the run once the step is done and saved, before the first step at once; a second one at once.

    Args:
        experiment: what to train.
        as_yaml: the same in the words of an experiment file, to be kept as the folder's experiment.yaml and, where the
            run is resumed, to be compared with that; None: neither.

    Raises:
        UserError: caches, tokenizer, settings or the checkpoints to go on from are not fit to train on; another process
            trains in the run's folder; resumed, the training curve would change.
        RuntimeError: the loss or the weights are not finite any more, or the disk is full.
        KeyboardInterrupt: a signal came; `siglit.stopping.Terminated` for SIGTERM.
    """
    run_folder.quiet_lightning()
    first = run_folder.is_first_process()
    with stopping_at_signals() as signals, ending_with_first_process(first):
        data, steps = _open(experiment)
        folder = run_folder.output_dir(experiment)
        with checkpoints.naming_a_full_disk(folder), contextlib.ExitStack() as stack:
            if first:
                try:
                    stack.enter_context(exclusive(folder))
                except CacheError as error:
                    raise UserError(str(error)) from None
            return _run(experiment, as_yaml, data, steps, folder, signals)


def _open(experiment: Experiment) -> tuple[TrainData, int]:
    """The data and the number of steps; nothing is written yet."""
    train = experiment.train
    run_folder.check_batch_size(train)
    run_folder.check_accelerator("train.accelerator", train.accelerator)
    run_folder.check_launched("train.nodes", train.nodes)
    run_folder.check_slurm_tasks("train", train.devices, train.nodes)
    data = open_data(experiment)
    run_folder.check_batch_fits(train, data.count)
    steps = total_steps(train, data.count)
    rate(0, experiment.optim, steps, train.batch_size)  # raises before anything is made
    return data, steps


def _run(
    experiment: Experiment, as_yaml: str | None, data: TrainData, steps: int, folder: Path, signals: Signals
) -> TrainResult:
    last = folder / "checkpoints" / checkpoints.LAST
    resumed, taken_before = _going_on(experiment, folder, as_yaml)
    record = Record(folder, as_yaml)
    pl.seed_everything(experiment.seed, verbose=False)
    module = SigLiT(experiment, steps)
    trainer = _trainer(experiment, folder, steps, taken_before, signals, record)
    begun = time.monotonic()
    _fit(trainer, module, data, last if resumed else None, signals)
    seconds = time.monotonic() - begun
    taken = trainer.global_step
    progress = next(c for c in trainer.callbacks if isinstance(c, TrainProgress))  # type: ignore[attr-defined]
    if taken > steps:
        raise UserError(f"{last} has taken {taken} steps, more than the {steps} asked for; choose another --output_dir")
    if not (folder / resuming.RECORD).exists():
        record.keep(trainer)  # also of a run that had come to its end before
    earlier = run_folder.summary(experiment).get("train")
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
        run_folder.add_to_summary(experiment, "train", asdict(result))
    return result


def _going_on(experiment: Experiment, folder: Path, as_yaml: str | None) -> tuple[bool, int]:
    """Whether there is a checkpoint to go on from, and its step as far as the first process needs to know it.

    All ranks look, and are refused together: one alone would leave the others waiting. The first one repairs and tells.

    Raises:
        UserError: the run is not to be resumed but has checkpoints, all of them are damaged, or the training curve
            would change.
    """
    kept = folder / "checkpoints"
    first = run_folder.is_first_process()
    wanted = experiment.train.resume or int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    if checkpoints.exist(kept) and not wanted:
        raise UserError(
            f"{folder} holds the checkpoints of an earlier run; continue it with --resume (or --train.resume true), "
            "or choose another --output_dir"
        )
    path = checkpoints.prepare(kept) if first else kept / checkpoints.LAST
    if path is None:
        if wanted:
            print(f"{kept} holds no checkpoint: training begins at the first step", file=sys.stderr, flush=True)
        return False, 0
    if as_yaml is not None and (first or path.exists()):
        resuming.check_resumed(folder, checkpoints.trained_as(path), experiment, as_yaml, quiet=not first)
    return (True, checkpoints.steps_taken(path)) if first else (wanted and checkpoints.exist(kept), 0)


def _fit(trainer: pl.Trainer, module: SigLiT, data: TrainData, start: Path | None, signals: Signals) -> None:
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(start) if start else None, weights_only=True)
    except checkpoints.Stopped:
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

    def __init__(self, folder: Path, as_yaml: str | None):
        """Take the experiment as YAML; None: leave nothing."""
        self._folder, self._as_yaml = folder, as_yaml

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything that may be refused has been read by now, the checkpoint included."""
        self.keep(trainer)

    def keep(self, trainer: pl.Trainer) -> None:
        """Write it, once."""
        if self._as_yaml is not None and trainer.is_global_zero:
            resuming.keep(self._folder, self._as_yaml)
            self._as_yaml = None


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
            print(trainer.datamodule.shuffle_told(), file=sys.stderr, flush=True)  # type: ignore[attr-defined]
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


def _trainer(
    experiment: Experiment, folder: Path, steps: int, taken: int, signals: Signals, record: Record
) -> pl.Trainer:
    train = experiment.train
    precision = train.precision
    if precision == "auto":
        precision = "bf16-mixed" if train.accelerator != "cpu" and torch.cuda.is_available() else "32-true"
    every = min(train.val_every or steps, steps)
    plugins: list[Any] = [checkpoints.AtomicFiles()]
    if SLURMEnvironment.detect():
        # Lightning's own requeueing would go on from a file of its own.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return pl.Trainer(
        accelerator=train.accelerator,
        devices=train.devices,
        num_nodes=train.nodes,
        strategy=_strategy(train),
        precision=precision,
        plugins=plugins,
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        log_every_n_steps=min(train.log_every, steps),
        gradient_clip_val=experiment.optim.clip or None,
        use_distributed_sampler=False,
        callbacks=[
            record,
            StepSeed(experiment.seed),
            Watch(train.batch_size, folder / "checkpoints"),
            TrainProgress(train.batch_size, steps),
            checkpoints.Checkpoints(folder / "checkpoints" / checkpoints.LAST, every, steps, signals),
        ],
        logger=_loggers(experiment, folder, taken),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _strategy(train: TrainConfig) -> Strategy | str:
    ranks = train.devices * train.nodes
    if ranks == 1:
        return "auto"
    if train.strategy != "fsdp2":
        return DDPStrategy(gradient_as_bucket_view=True)
    if train.precision == "16-mixed":
        raise UserError("train.strategy fsdp2 has no 16-mixed; set train.precision to bf16-mixed or 32-true")
    return Sharded(ranks)


def _loggers(experiment: Experiment, folder: Path, taken: int) -> list[Logger]:
    table = MetricsTable(folder / "metrics.csv")
    if run_folder.is_first_process():
        table.go_on_after(taken)
    loggers: list[Logger] = [table]
    try:
        if "tensorboard" in experiment.train.loggers:
            from lightning.pytorch.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(folder, name="", version="tensorboard", purge_step=taken or None))
        if "wandb" in experiment.train.loggers:
            from lightning.pytorch.loggers import WandbLogger

            loggers.append(WandbLogger(name=experiment.name, save_dir=folder))
    except ModuleNotFoundError as error:
        told, extras = str(error).splitlines()[0], ",".join(experiment.train.loggers)
        raise UserError(f"train.loggers: {told}; install it: pip install 'siglit[{extras}]'") from error
    return loggers
