"""Lightning's trainer for an experiment: strategy, precision, loggers and callbacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy

from siglit.config import Experiment, TrainConfig
from siglit.errors import UserError
from siglit.runs import checkpoints
from siglit.runs.launch import is_first_process
from siglit.runtime.signals import Signals
from siglit.training.callbacks import ExperimentRecord, StepSeed, TrainProgress
from siglit.training.checkpointing import AtomicCheckpointIO, CheckpointSaver
from siglit.training.fsdp import FSDP2Strategy
from siglit.training.metrics_csv import MetricsTable
from siglit.training.monitor import TrainingMonitor

LightningPrecision = Literal["32-true", "bf16-mixed", "16-mixed"]


def build_trainer(
    experiment: Experiment, folder: Path, steps: int, steps_taken: int, signals: Signals, record: ExperimentRecord
) -> pl.Trainer:
    """Build the trainer.

    Args:
        experiment: what to train.
        folder: of the run.
        steps: optimizer steps of the whole training.
        steps_taken: how many of them the checkpoint to resume from has; 0 for none.
        signals: where a signal to stop is noted.
        record: writes the experiment into the folder when training starts.

    Raises:
        UserError: train.strategy does not support train.precision, or a logger of train.loggers is not installed.
    """
    train = experiment.train
    cuda = train.accelerator != "cpu" and torch.cuda.is_available()
    every = min(train.val_every or steps, steps)
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        # Lightning's own requeueing would resume from a checkpoint of its own.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    monitor = TrainingMonitor(train.batch_size, folder / "checkpoints")
    return pl.Trainer(
        accelerator=train.accelerator,
        devices=train.devices,
        num_nodes=train.nodes,
        strategy=_strategy(train),
        precision=lightning_precision(train.precision, cuda=cuda),
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
            monitor,
            TrainProgress(train.batch_size, steps),
            CheckpointSaver(
                folder / "checkpoints" / checkpoints.LAST,
                every,
                steps,
                signals,
                keep_every=train.keep_every,
                check_finite=monitor.check,
            ),
        ],
        logger=_loggers(experiment.name, train.loggers, folder, steps_taken),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def lightning_precision(precision: Literal["auto"] | LightningPrecision, *, cuda: bool) -> LightningPrecision:
    """Resolve train.precision: auto is bf16-mixed on CUDA and 32-true elsewhere."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if cuda else "32-true"


def _strategy(train: TrainConfig) -> Strategy | str:
    ranks = train.devices * train.nodes
    if ranks == 1:
        return "auto"
    if train.strategy != "fsdp2":
        return DDPStrategy(gradient_as_bucket_view=True)
    if train.precision == "16-mixed":
        raise UserError("train.strategy fsdp2 has no 16-mixed; set train.precision to bf16-mixed or 32-true")
    return FSDP2Strategy(ranks)


def _loggers(name: str, chosen: Sequence[str], folder: Path, steps_taken: int) -> list[Logger]:
    """metrics.csv, and the `chosen` ones of train.loggers."""
    table = MetricsTable(folder / "metrics.csv")
    if is_first_process():
        table.keep_first(steps_taken)
    loggers: list[Logger] = [table]
    try:
        if "tensorboard" in chosen:
            from lightning.pytorch.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(folder, name="", version="tensorboard", purge_step=steps_taken or None))
        if "wandb" in chosen:
            from lightning.pytorch.loggers import WandbLogger

            loggers.append(WandbLogger(name=name, save_dir=folder))
    except ModuleNotFoundError as error:
        reason, extras = str(error).splitlines()[0], ",".join(chosen)
        raise UserError(f"train.loggers: {reason}; install it: pip install 'siglit[{extras}]'") from error
    return loggers
