"""What siglit relies on in Lightning beyond its documented interface: one function for each reach.

`tests/training/test_lightning_internals.py` has a test for each of them, which fails when Lightning changes what the
function relies on. Knows nothing of what is trained.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import Profiler
from typing_extensions import override


def is_logged_step(trainer: pl.Trainer) -> bool:
    """Tell whether the current step, or between two steps the next one, becomes a row of the loggers.

    Lightning decides it, and no hook says so before the step is over. Sums over the ranks and waits for the device are
    paid for on these steps alone.
    """
    return trainer._logger_connector.should_update_logs


def call_before_batch_fetch(trainer: pl.Trainer, action: Callable[[], None]) -> None:
    """Call `action` each time the training loop is about to ask its loader for a batch.

    No hook of a callback runs then, but Lightning's profiler is started for it.
    """
    trainer.profiler = _FetchProfiler(action)  # type: ignore[attr-defined]


class _FetchProfiler(Profiler):
    def __init__(self, action: Callable[[], None]):
        super().__init__()
        self._action = action

    @override
    def start(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self._action()

    @override
    def stop(self, action_name: str) -> None:
        pass


def validate_after_this_step(trainer: pl.Trainer) -> None:
    """Run the validation loop after the current step and after each later one; for `on_train_batch_end`.

    `trainer.should_stop` would also log a row that an uninterrupted run does not have.
    """
    trainer.val_check_batch = 1


def mark_step_as_validated(checkpoint: dict[str, Any]) -> None:
    """Set the loop counters of a checkpoint that is saved during validation to those of `on_train_batch_end`.

    A run that is resumed from these counters starts with the next step and does not repeat the validation.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    for counters in (progress["total"], progress["current"]):
        assert counters["completed"] == counters["processed"]
        counters["completed"] -= 1
    if progress["is_last_batch"]:
        # Lightning would count the next epoch as begun already, and from the second such resume on count one too few.
        for counters in (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
            counters["processed"] = counters["completed"] = counters["started"]
        progress["is_last_batch"] = False


def unscale_gradients_before_step(optimizer: torch.optim.Optimizer) -> None:
    """Withdraw a fused optimizer's offer to unscale fp16 gradients in its step.

    Lightning refuses to clip gradients that such an optimizer has yet to unscale, even in bf16. Without the offer they
    are unscaled before they are clipped, as for every other optimizer.
    """
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
