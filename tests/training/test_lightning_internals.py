"""What siglit relies on in Lightning: each test fails when Lightning changes what one function relies on."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from siglit.training.lightning_internals import (
    call_before_batch_fetch,
    is_logged_step,
    mark_step_as_validated,
    unscale_gradients_before_step,
    validate_after_this_step,
)


class Tiny(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, _):
        loss = self.layer(batch).sum()
        self.log("loss", loss)
        return loss

    def validation_step(self, *_):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def val_dataloader(self):
        return [0]


class Batches:
    """Calls `produced` for each batch."""

    def __init__(self, produced=lambda: None):
        self.produced = produced

    def __len__(self):  # of loaders of unknown length Lightning fetches a batch ahead
        return 100

    def __iter__(self):
        for _ in range(len(self)):
            self.produced()
            yield torch.ones(3, 2)

    def state_dict(self):  # as a loader has that can be resumed
        return {}

    def load_state_dict(self, state):
        pass


def fit(callback, *, steps=5, val_every=100, batches=None, resume_from=None, logger=False):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=val_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=2,
        callbacks=[callback],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Tiny(), Batches() if batches is None else batches, ckpt_path=resume_from, weights_only=True)


def test_a_logged_step_is_known_before_during_and_after_it(tmp_path):
    """The steps for which it says yes are those of which the logger gets a row."""
    logged = {"fetch": [], "start": [], "end": []}

    class Ask(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            fetch = lambda: logged["fetch"].append(trainer.global_step) if is_logged_step(trainer) else None  # noqa: E731
            call_before_batch_fetch(trainer, fetch)

        def on_train_batch_start(self, trainer, *_):
            if is_logged_step(trainer):
                logged["start"].append(trainer.global_step)

        def on_train_batch_end(self, trainer, *_):
            if is_logged_step(trainer):
                logged["end"].append(trainer.global_step - 1)

    logger = CSVLogger(tmp_path, name="", version="")
    rows = []
    real = logger.log_metrics
    logger.log_metrics = lambda metrics, step: (rows.append(step), real(metrics, step))
    fit(Ask(), logger=logger)
    assert rows == [1, 3]
    assert logged["start"] == logged["end"] == rows
    assert set(rows) <= set(logged["fetch"])


def test_the_action_comes_before_each_batch():
    events = []

    class Watch(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            call_before_batch_fetch(trainer, lambda: events.append("action"))

    fit(Watch(), batches=Batches(lambda: events.append("batch")), steps=3)
    assert events == ["action", "batch"] * 3


def test_validation_runs_after_the_step_that_requests_it():
    validated = []

    class Ask(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                validate_after_this_step(trainer)

        def on_validation_start(self, trainer, *_):
            validated.append(trainer.global_step)

    fit(Ask(), steps=3)
    assert validated == [3]


class Save(pl.Callback):
    """Saves at step 2, within validation; records what is trained and validated."""

    def __init__(self, path):
        self.path = path
        self.trained, self.validated, self.progress = [], [], {}

    def on_train_batch_end(self, trainer, *_):
        self.trained.append(trainer.global_step)
        self.progress[trainer.global_step] = copy.deepcopy(trainer.fit_loop.epoch_loop.batch_progress.state_dict())

    def on_validation_end(self, trainer, *_):
        self.validated.append(trainer.global_step)
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)

    def on_save_checkpoint(self, trainer, module, checkpoint):
        mark_step_as_validated(checkpoint)


def test_a_run_is_resumed_with_the_next_step_and_repeats_no_validation(tmp_path):
    path = tmp_path / "last.ckpt"
    first, second = Save(path), Save(path)
    fit(first, steps=2, val_every=2)
    saved = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert saved == first.progress[2]
    fit(second, steps=4, val_every=2, resume_from=path)
    assert second.trained == [3, 4]
    assert second.validated == [4]


@pytest.mark.parametrize("withdrawn", [False, True])
def test_a_fused_optimizer_is_clipped_once_its_offer_is_withdrawn(withdrawn):
    layer = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer.weight.grad = torch.tensor([[30.0, 40.0]])
    precision = MixedPrecision("bf16-mixed", "cpu")
    if withdrawn:
        unscale_gradients_before_step(optimizer)
        precision.clip_gradients(optimizer, 1.0)
        torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6, 0.8]]))
    else:
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            precision.clip_gradients(optimizer, 1.0)
