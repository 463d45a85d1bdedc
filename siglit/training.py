"""`siglit train`: trains the text tower on the cache.

Sets up Lightning and the run's folder; what is trained is `siglit.lightning_module`.
"""

import csv
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import DDPStrategy

from siglit import run as run_folder
from siglit.config import Experiment
from siglit.data_module import open_data
from siglit.errors import UserError
from siglit.lightning_module import SigLiT
from siglit.optim import total_steps
from siglit.progress import Meter
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


def run(experiment: Experiment) -> TrainResult:
    """Train as the experiment says and write checkpoints, metrics.csv and summary.json into the run's folder.

    Raises:
        UserError: caches, tokenizer or settings are not fit to train on.
    """
    run_folder.quiet_lightning()
    if experiment.train.batch_size % (experiment.train.devices * experiment.train.nodes):
        raise UserError(
            f"train.batch_size {experiment.train.batch_size} cannot be shared evenly by "
            f"{experiment.train.devices * experiment.train.nodes} devices"
        )
    run_folder.check_accelerator("train.accelerator", experiment.train.accelerator)
    data = open_data(experiment)
    folder = run_folder.output_dir(experiment)
    steps = total_steps(experiment.train, data.count)
    last = folder / "checkpoints" / "last.ckpt"
    resuming = experiment.train.resume and last.exists()
    if last.exists() and not resuming and run_folder.is_first_process():
        raise UserError(
            f"{folder} holds the checkpoints of an earlier run; continue it with --train.resume true, "
            "or choose another --output_dir"
        )
    pl.seed_everything(experiment.seed, verbose=False)
    module = SigLiT(experiment, steps)
    trainer = _trainer(experiment, folder, steps, keep_rows=resuming)
    begun = time.monotonic()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if resuming else None, weights_only=True)
    except SystemExit as stop:  # how Lightning leaves after Ctrl-C
        raise (KeyboardInterrupt if trainer.interrupted else stop) from stop
    seconds = time.monotonic() - begun
    taken = trainer.global_step
    progress = next(c for c in trainer.callbacks if isinstance(c, TrainProgress))  # type: ignore[attr-defined]
    if taken > steps:
        raise UserError(f"{last} has taken {taken} steps, more than the {steps} asked for; choose another --output_dir")
    earlier = run_folder.summary(experiment).get("train")
    if progress.first_step in (None, taken) and earlier:
        return TrainResult(**earlier)
    trainer.save_checkpoint(last)
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
        assert self._meter is not None
        if is_logged(trainer):
            shown = {k: v for k, v in trainer.logged_metrics.items() if k in ("train/loss", "val/text_to_image/R@1")}
            self._note = "  ".join(f"{k} {float(v):.3g}" for k, v in shown.items())
        self._meter.advance(self._batch_size, f"step {trainer.global_step}  {self._note}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the rate."""
        self._close(None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the terminal right again."""
        self._close(type(exception))

    def _close(self, kind: type[BaseException] | None) -> None:
        if self._meter is not None:
            self.rate = self._meter.rate
            self._meter.__exit__(kind, None, None)
            self._meter = None


def _trainer(experiment: Experiment, folder: Path, steps: int, *, keep_rows: bool) -> pl.Trainer:
    train = experiment.train
    several = train.devices * train.nodes > 1
    precision = train.precision
    if precision == "auto":
        precision = "bf16-mixed" if train.accelerator != "cpu" and torch.cuda.is_available() else "32-true"
    every = min(train.val_every or steps, steps)
    checkpoints = ModelCheckpoint(
        dirpath=folder / "checkpoints",
        filename="last",
        every_n_train_steps=every,
        save_top_k=1,
        enable_version_counter=False,
    )
    return pl.Trainer(
        accelerator=train.accelerator,
        devices=train.devices,
        num_nodes=train.nodes,
        strategy=DDPStrategy(gradient_as_bucket_view=True) if several else "auto",
        precision=precision,
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        limit_val_batches=0 if experiment.data.val is None else 1,
        num_sanity_val_steps=0,
        log_every_n_steps=min(train.log_every, steps),
        gradient_clip_val=experiment.optim.clip or None,
        use_distributed_sampler=False,
        callbacks=[
            checkpoints,
            Watch(train.batch_size, folder / "checkpoints"),
            TrainProgress(train.batch_size, steps),
        ],
        logger=_loggers(experiment, folder, keep_rows=keep_rows),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _loggers(experiment: Experiment, folder: Path, *, keep_rows: bool) -> list[Logger]:
    table = CSVLogger(folder, name="", version="")
    earlier = folder / "metrics.csv"
    if keep_rows and earlier.exists() and run_folder.is_first_process():
        with earlier.open(newline="") as file:
            rows = [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
        # Opening the logger for writing deletes the file; the rows so far are handed back to it.
        table.experiment.metrics.extend(rows)
    loggers: list[Logger] = [table]
    try:
        if "tensorboard" in experiment.train.loggers:
            from lightning.pytorch.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
        if "wandb" in experiment.train.loggers:
            from lightning.pytorch.loggers import WandbLogger

            loggers.append(WandbLogger(name=experiment.name, save_dir=folder))
    except ModuleNotFoundError as error:
        raise UserError(
            f"train.loggers: {error}; install the extra, such as pip install 'siglit[tensorboard]'"
        ) from error
    return loggers
