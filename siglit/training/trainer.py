"""Lightning's trainer for an experiment: strategy, precision, loggers and callbacks."""

from pathlib import Path
from typing import Any

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
from siglit.training.callbacks import Record, StepSeed, TrainProgress
from siglit.training.checkpointing import AtomicFiles, Checkpoints
from siglit.training.fsdp import Sharded
from siglit.training.metrics_csv import MetricsTable
from siglit.training.monitor import TrainingMonitor


def build_trainer(
    experiment: Experiment, folder: Path, steps: int, taken: int, signals: Signals, record: Record
) -> pl.Trainer:
    """Lightning's trainer, which ends after `steps` steps of which `taken` are done."""
    train = experiment.train
    precision = train.precision
    if precision == "auto":
        precision = "bf16-mixed" if train.accelerator != "cpu" and torch.cuda.is_available() else "32-true"
    every = min(train.val_every or steps, steps)
    plugins: list[Any] = [AtomicFiles()]
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
            TrainingMonitor(train.batch_size, folder / "checkpoints"),
            TrainProgress(train.batch_size, steps),
            Checkpoints(folder / "checkpoints" / checkpoints.LAST, every, steps, signals),
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
    if is_first_process():
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
