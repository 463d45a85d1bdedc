"""Monitoring a run: norms, speed and where the time goes on logged steps, and a stop when the run has diverged.

Knows Lightning and that a batch has `rows`, not what is trained: a tower is any child of the module that learns.
Shapes: B pairs per rank.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from siglit.runs.checkpoints import LAST, PREVIOUS
from siglit.training.lightning_internals import call_before_batch_fetch, is_logged_step

_PEAK_FLOPS = {
    r"NVIDIA B200": 2250e12,
    r"NVIDIA H200": 989e12,
    r"NVIDIA H100 80GB HBM3": 989e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA A100[-A-Z0-9 ]*GB( PCIe)?": 312e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA L4": 121e12,
    r"NVIDIA GeForce RTX 4090": 165e12,
    r"NVIDIA GeForce RTX 3090": 71e12,
}
"""Dense bfloat16 FLOP/s by CUDA's full name of the device: slices (MIG), NVL and laptop variants have other peaks."""

_OWN = ""
"""Key of the module's own parameters among those of its towers."""
_KEYS_IN_MESSAGE = 3
_MAX_UNCHECKED_STEPS = 100
"""Most steps whose loss and rows are kept on the device before they are checked, however rarely a step is logged."""


class StepTimer:
    """Seconds by part of one step; parts do not overlap, and on CUDA each waits for the device at its start and end."""

    def __init__(self) -> None:
        """Wait for the first `switch_to`."""
        self.seconds: dict[str, float] = {}
        self._part: str | None = None
        self._since = 0.0

    def switch_to(self, part: str | None) -> None:
        """End the current part and begin another, or none."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._part is not None:
            self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the block as `part`, interrupting the current part; does nothing while no part is timed."""
        outer = self._part
        if outer is None:
            yield
            return
        self.switch_to(part)
        yield
        self.switch_to(outer)

    def shares(self) -> dict[str, float]:
        """Share of each part in the time of all parts; resets the timer."""
        total = max(sum(self.seconds.values()), 1e-9)
        shares = {part: seconds / total for part, seconds in self.seconds.items()}
        self.seconds = {}
        return shares


class NonFiniteError(RuntimeError):
    """A loss or the weights of a run are no longer finite."""

    exit_code = 3
    """Of the command line."""


class TrainingMonitor(pl.Callback):
    """Logs how a run is doing, and stops it when a loss or the weights are no longer finite.

    Logs on the steps that Lightning logs, and on no other:

    - `train/grad_norm` and `train/update_norm` of all trained parameters, and of each tower `train/TOWER/grad_norm`
      (before clipping, averaged over the ranks), `param_norm` (after the step) and `update_norm` (of the difference the
      step made, weight decay included), as in the paper's Figure 5;
    - `train/examples_per_second` since the last logged step, without validation;
    - `time/data` (waiting for the batch), `time/towers` (forward and backward), `time/loss` and `time/optimizer` (with
      clipping): shares of this one step, which waits for the device between them. The losses compute their gradients
      in their forward, so `time/loss` is the whole of the loss;
    - `train/mfu`: model FLOP/s utilization, the towers' FLOP/s as a share of the hardware's peak, where `peak_flops`
      knows it.

    The module must have a `step_timer` and an `embed(batch)`. Times are those of the first rank.
    """

    def __init__(self, batch_size: int, checkpoints: Path):
        """Count examples in global batches.

        Args:
            batch_size: pairs of the global batch.
            checkpoints: folder of the checkpoints, of which a message names the newest to resume from.
        """
        self._batch_size, self._checkpoints = batch_size, checkpoints
        self._logged = False
        self._norms: dict[str, torch.Tensor] = {}
        self._before: dict[str, list[torch.Tensor]] = {}
        self._unchecked: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._counted_from = (0.0, 0)
        self._peak_flops: float | None = None
        self._flops_per_pair: float | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Time a logged step from the moment when its batch is fetched."""

        def start_timer() -> None:
            if is_logged_step(trainer):
                _timer(pl_module).switch_to("data")

        call_before_batch_fetch(trainer, start_timer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting examples."""
        self._counted_from = time.perf_counter(), trainer.global_step
        sharded = any(isinstance(p, DTensor) for p in pl_module.parameters())  # FlopCounterMode would count the shards
        self._peak_flops = None if sharded else peak_flops(pl_module.device)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check before anything is validated or saved; leave the time of validation out of the rate."""
        self.check(trainer)
        self._counted_from = self._counted_from[0] - time.perf_counter(), self._counted_from[1]

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue counting."""
        self._counted_from = self._counted_from[0] + time.perf_counter(), self._counted_from[1]

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start timing the towers; count their FLOPs once."""
        if self._peak_flops is not None and self._flops_per_pair is None:
            with trainer.precision_plugin.forward_context():
                self._flops_per_pair = flops_per_pair(pl_module, batch)
        self._logged = is_logged_step(trainer)
        if self._logged:
            _timer(pl_module).switch_to("towers")

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Compute the norms of the gradients, and copy the weights to compute the norm of the update later."""
        if not self._logged:
            return
        _timer(pl_module).switch_to(None)
        towers = _towers(pl_module)
        parts = {**towers, _OWN: _own(pl_module)}
        self._before = {name: [p.detach().clone() for p in parameters] for name, parameters in parts.items()}
        self._norms = {f"train/{name}/grad_norm": _grad_norm(parameters) for name, parameters in towers.items()}
        self._norms["train/grad_norm"] = _grad_norm(pl_module.parameters())
        _timer(pl_module).switch_to("optimizer")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep loss and rows to be checked later; log if this is a logged step."""
        self._unchecked.append((trainer.global_step, outputs["loss"], batch["rows"]))
        if not self._logged:
            if len(self._unchecked) >= _MAX_UNCHECKED_STEPS:
                self.check(trainer)
            return
        _timer(pl_module).switch_to(None)
        now, steps = time.perf_counter(), trainer.global_step
        rate = (steps - self._counted_from[1]) * self._batch_size / (now - self._counted_from[0])
        self._counted_from = now, steps
        metrics: dict[str, Any] = {**self._norms, "train/examples_per_second": rate}
        if self._peak_flops is not None and self._flops_per_pair is not None:
            metrics["train/mfu"] = rate * self._flops_per_pair / (trainer.world_size * self._peak_flops)
        updates = [self._update_norm(_OWN, _own(pl_module))]
        for name, parameters in _towers(pl_module).items():
            updates.append(self._update_norm(name, parameters))
            metrics[f"train/{name}/param_norm"] = _norm([p.detach() for p in parameters])
            metrics[f"train/{name}/update_norm"] = updates[-1]
        metrics["train/update_norm"] = _norm(updates)
        metrics |= {f"time/{part}": share for part, share in _timer(pl_module).shares().items()}
        pl_module.log_dict(metrics)
        self.check(trainer)

    def _update_norm(self, part: str, parameters: list[nn.Parameter]) -> torch.Tensor:
        """Norm of what the step has changed; frees the copies."""
        difference = self._before.pop(part)
        if len(difference) > 0:
            torch._foreach_sub_(difference, [p.detach() for p in parameters])
        return _norm(difference)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to save weights that are not finite."""
        self.check(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the losses that are left."""
        self.check(trainer)

    def check(self, trainer: pl.Trainer) -> None:
        """Check the losses since the last check, and the weights; all ranks together, because all of them stop.

        Raises:
            NonFiniteError: a loss or the weights are not finite; names the step, its batch and the newest checkpoint to
                resume from.
            SystemExit: the same, on the other ranks.
        """
        weights = _norm([p.detach() for p in trainer.lightning_module.parameters() if p.requires_grad])
        values = torch.stack([weights.float(), *(loss.float() for _, loss, _ in self._unchecked)])
        non_finite = trainer.strategy.reduce((~values.isfinite()).int(), reduce_op="sum").tolist()
        unchecked, self._unchecked = self._unchecked, []
        if not any(non_finite):
            return
        first = next((step for step, bad in zip(unchecked, non_finite[1:], strict=True) if bad), None)
        problem = f"the weights are no longer finite after step {trainer.global_step}"
        if first is not None:
            step, loss, rows = first
            problem = f"the loss is {float(loss)} at step {step}, in the batch of {_keys(trainer, rows)}"
        if not trainer.is_global_zero:
            # When another rank fails, Lightning kills the first one, perhaps before it has shown the message.
            raise SystemExit(0)
        saved = [path for name in (LAST, PREVIOUS) if (path := self._checkpoints / name).exists()]
        newest = f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"
        raise NonFiniteError(f"{problem}; lower optim.lr, or check the cache with `siglit cache verify`; {newest}")


def peak_flops(device: torch.device) -> float | None:
    """Peak of a device in dense bfloat16 FLOP/s, None where it is not known.

    Source: the vendor's data sheets, figures without sparsity.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for pattern, peak in _PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)


def flops_per_pair(module: Any, batch: Mapping[str, torch.Tensor]) -> float:
    """Floating-point operations of the towers for one pair, forward and backward, without any recomputation.

    Counted by running one pair without compilation; gradients and random state stay unchanged.

    Args:
        module: has `embed(batch)`, which returns the embeddings of images and of texts.
        batch: tensors of B rows.
    """
    one = {name: rows[:1] for name, rows in batch.items()}
    devices = [module.device] if module.device.type == "cuda" else []
    trainable = [p for p in module.parameters() if p.requires_grad]
    counter = FlopCounterMode(display=False)
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), counter:
        embedded = [z.sum() for z in module.embed(one) if z.requires_grad]
        torch.autograd.grad(embedded, trainable, allow_unused=True)
    return float(counter.get_total_flops())


def _timer(module: pl.LightningModule) -> StepTimer:
    timer = module.step_timer
    assert isinstance(timer, StepTimer)
    return timer


def _towers(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """{name: trainable parameters} of the children that have any."""
    towers = {name: [p for p in child.parameters() if p.requires_grad] for name, child in module.named_children()}
    return {name: parameters for name, parameters in towers.items() if parameters}


def _own(module: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters that are not in a child, such as the loss's t' and b."""
    return [p for p in module.parameters(recurse=False) if p.requires_grad]


def _grad_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    return _norm([p.grad for p in parameters if p.grad is not None])


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _keys(trainer: pl.Trainer, rows: torch.Tensor) -> str:
    """The first keys of the global batch, and how many more there are; row numbers where the loader has no keys."""
    all_rows = trainer.strategy.all_gather(rows).flatten().tolist()
    first = all_rows[:_KEYS_IN_MESSAGE]
    keys = getattr(trainer.train_dataloader, "keys", None)
    text = "rows " + ", ".join(map(str, first)) if keys is None else ", ".join(map(str, keys(first)))
    more = len(all_rows) - len(first)
    return text + (f" and {more:,} more" if more else "")
