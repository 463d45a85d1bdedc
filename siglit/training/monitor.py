"""Watching a run: norms, speed and where the time goes on the steps that are logged, and the end of a run gone bad.

Knows Lightning and that a batch has `rows`, not what is trained: a tower is any child of the module that learns.
Shapes: B pairs per rank.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import Profiler
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

_PEAKS = {
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

_KEYS_TOLD = 3
_UNREAD_AT_MOST = 100
"""Steps whose loss and rows wait on the device to be looked at, however seldom is logged."""


class Clock:
    """Seconds by part of one step; parts do not overlap, and on CUDA each waits for the device at its ends."""

    def __init__(self) -> None:
        """Stand still; `to` starts it."""
        self.seconds: dict[str, float] = {}
        self._part: str | None = None
        self._since = 0.0

    def to(self, part: str | None) -> None:
        """End the current part and begin another, or none."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._part is not None:
            self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the block as `part`, within whatever part is current; costs nothing while the clock stands still."""
        around = self._part
        if around is None:
            yield
            return
        self.to(part)
        yield
        self.to(around)

    def shares(self) -> dict[str, float]:
        """Share of each part in the whole; begins anew."""
        total = max(sum(self.seconds.values()), 1e-9)
        shares = {part: seconds / total for part, seconds in self.seconds.items()}
        self.seconds = {}
        return shares


class TrainingMonitor(pl.Callback):
    """Logs how a run is doing, and stops it when a loss or the weights are no longer finite.

    On the steps that Lightning logs, and on no other:

    - `train/grad_norm`, and of each tower `train/TOWER/grad_norm` (before clipping, averaged over the ranks),
      `param_norm` (after the step) and `update_norm` (of the difference the step made), as in the paper's Figure 5;
    - `train/examples_per_second` since the last logged step, validation apart;
    - `time/data` (waiting for the batch), `time/towers` (forward and backward), `time/loss` and `time/optimizer` (with
      clipping), shares of this one step, which waits for the device at their borders. Gradients of our losses are
      computed in their forward, so it is the whole loss that counts as such;
    - `train/mfu`: FLOP/s of the towers as a share of the hardware's peak, where that is known (`peak_flops`).

    The module has a `clock` and an `embed(batch)`. Times are those of the first rank.
    """

    def __init__(self, batch_size: int, checkpoints: Path):
        """Count examples in global batches; `checkpoints` is where the newest good checkpoint will be found."""
        self._batch_size, self._checkpoints = batch_size, checkpoints
        self._logged = False
        self._norms: dict[str, torch.Tensor] = {}
        self._before: dict[str, list[torch.Tensor]] = {}
        self._unread: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._mark = (0.0, 0)
        self._peak: float | None = None
        self._flops: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have the clock start when a batch is asked for, which no hook of a callback tells."""

        def begin() -> None:
            if is_logged(trainer):
                _clock(pl_module).to("data")

        trainer.profiler = _Fetches(begin)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count examples."""
        self._mark = time.perf_counter(), trainer.global_step
        sharded = any(isinstance(p, DTensor) for p in pl_module.parameters())  # FlopCounterMode would count the shards
        self._peak = None if sharded else peak_flops(pl_module.device)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look before anything is validated or saved; leave the time of validation out of the rate."""
        self.check(trainer)
        self._mark = self._mark[0] - time.perf_counter(), self._mark[1]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on counting."""
        self._mark = self._mark[0] + time.perf_counter(), self._mark[1]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin with the towers; count their FLOPs once."""
        if self._peak is not None and self._flops is None:
            with trainer.precision_plugin.forward_context():
                self._flops = flops_per_pair(pl_module, batch)
        self._logged = is_logged(trainer)
        if self._logged:
            _clock(pl_module).to("towers")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the norms of the gradients, and keep the weights for the size of the update."""
        if not self._logged:
            return
        _clock(pl_module).to(None)
        towers = _towers(pl_module)
        self._before = {name: [p.detach().clone() for p in parameters] for name, parameters in towers.items()}
        self._norms = {f"train/{name}/grad_norm": _grad_norm(parameters) for name, parameters in towers.items()}
        self._norms["train/grad_norm"] = _grad_norm(pl_module.parameters())
        _clock(pl_module).to("optimizer")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep loss and rows to be looked at later; log if this step is logged."""
        self._unread.append((trainer.global_step, outputs["loss"], batch["rows"]))
        if not self._logged:
            if len(self._unread) >= _UNREAD_AT_MOST:
                self.check(trainer)
            return
        _clock(pl_module).to(None)
        now, steps = time.perf_counter(), trainer.global_step
        rate = (steps - self._mark[1]) * self._batch_size / (now - self._mark[0])
        self._mark = now, steps
        figures: dict[str, Any] = {**self._norms, "train/examples_per_second": rate}
        if self._peak is not None and self._flops is not None:
            figures["train/mfu"] = rate * self._flops / (trainer.world_size * self._peak)
        for name, parameters in _towers(pl_module).items():
            after = [p.detach() for p in parameters]
            before = self._before.pop(name)
            torch._foreach_sub_(before, after)
            figures[f"train/{name}/param_norm"] = _norm(after)
            figures[f"train/{name}/update_norm"] = _norm(before)
        figures |= {f"time/{part}": share for part, share in _clock(pl_module).shares().items()}
        pl_module.log_dict(figures)
        self.check(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let no checkpoint be written of weights that are not finite."""
        self.check(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the losses that are left."""
        self.check(trainer)

    def check(self, trainer: pl.Trainer) -> None:
        """Look at the losses since the last look, and at the weights; all ranks together, for all of them stop.

        Raises:
            RuntimeError: one of them is not finite; names the step, its batch and the newest checkpoint.
            SystemExit: the same on the other ranks, which have nothing to add to it.
        """
        weights = _norm([p.detach() for p in trainer.lightning_module.parameters() if p.requires_grad])
        seen = torch.stack([weights.float(), *(loss.float() for _, loss, _ in self._unread)])
        bad = trainer.strategy.reduce((~seen.isfinite()).int(), reduce_op="sum").tolist()
        unread, self._unread = self._unread, []
        if not any(bad):
            return
        first = next((step for step, wrong in zip(unread, bad[1:], strict=True) if wrong), None)
        told = f"the weights are no longer finite after step {trainer.global_step}"
        if first is not None:
            step, loss, rows = first
            told = f"the loss is {float(loss)} at step {step}, in the batch of {_keys(trainer, rows)}"
        if not trainer.is_global_zero:
            raise SystemExit(0)  # Lightning kills the first rank, perhaps before it has told, when another one fails
        saved = sorted(self._checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        raise RuntimeError(f"{told}; lower optim.lr, or see with siglit cache verify if the cache is sound; {kept}")


class _Fetches(Profiler):
    """Calls `begin` when the training loop asks for a batch."""

    def __init__(self, begin: Callable[[], None]):
        super().__init__()
        self._begin = begin

    def start(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self._begin()

    def stop(self, action_name: str) -> None:
        pass


def is_logged(trainer: pl.Trainer) -> bool:
    """Tell whether the step that runs, or is about to, will be a row of metrics.csv; Lightning's own rule."""
    return trainer._logger_connector.should_update_logs


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a device, None where it is not known.

    Source: the vendor's data sheets, figures without sparsity.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for pattern, peak in _PEAKS.items() if re.fullmatch(pattern, name)), None)


def flops_per_pair(module: Any, batch: Mapping[str, torch.Tensor]) -> float:
    """Floating-point operations of the towers for one pair, forward and backward, nothing computed twice.

    Counted by running one pair without compilation; gradients and random state stay as they were.

    Args:
        module: has `embed(batch)`, which gives the embeddings of images and texts.
        batch: tensors of B rows.
    """
    one = {name: rows[:1] for name, rows in batch.items()}
    devices = [module.device] if module.device.type == "cuda" else []
    learning = [p for p in module.parameters() if p.requires_grad]
    counter = FlopCounterMode(display=False)
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), counter:
        embedded = [z.sum() for z in module.embed(one) if z.requires_grad]
        torch.autograd.grad(embedded, learning, allow_unused=True)
    return float(counter.get_total_flops())


def _clock(module: pl.LightningModule) -> Clock:
    clock = module.clock
    assert isinstance(clock, Clock)
    return clock


def _towers(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """{name: parameters that learn} of the children that do."""
    towers = {name: [p for p in child.parameters() if p.requires_grad] for name, child in module.named_children()}
    return {name: parameters for name, parameters in towers.items() if parameters}


def _grad_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    return _norm([p.grad for p in parameters if p.grad is not None])


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _keys(trainer: pl.Trainer, rows: torch.Tensor) -> str:
    """The first keys of the global batch, and how many more there are; numbers where the loader knows no keys."""
    everywhere = trainer.strategy.all_gather(rows).flatten().tolist()
    keys = getattr(trainer.train_dataloader, "keys", None)
    named = everywhere[:_KEYS_TOLD]
    told = ", ".join(map(str, keys(named))) if keys else "rows " + ", ".join(map(str, named))
    more = len(everywhere) - len(named)
    return told + (f" and {more:,} more" if more else "")
