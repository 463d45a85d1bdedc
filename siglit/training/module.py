"""Both towers and the loss, put together for Lightning.

Knows the experiment; what is read is `siglit.training.data`, commands and files belong to the stages. The mode changes
the image side and the batches that come in, nothing else. Shapes: B pairs per rank, L tokens, D embedding width.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from siglit.config import Experiment, plain
from siglit.data.epoch_loader import Batch
from siglit.errors import UserError
from siglit.evaluation.encoding import encode
from siglit.evaluation.retrieval import retrieval_metrics
from siglit.loss import Negatives, sigmoid_loss, softmax_loss
from siglit.loss.exchange import gather_rows
from siglit.models.image_tower import ImageEncoder
from siglit.models.text_tower import TextTower
from siglit.training.data import Sample, TrainDataModule
from siglit.training.fsdp import shard, unsharded
from siglit.training.monitor import Clock, is_logged
from siglit.training.optim import build_optimizer, lr_multiplier, parameter_groups

_logger = logging.getLogger(__name__)

_WATCHED = ("positive_logit", "negative_logit", "positive_share")
"""Statistics of the loss that are logged, see `sigmoid_loss`."""


class SigLiT(pl.LightningModule):
    """Two towers that learn to meet under the sigmoid loss; locked, the image tower is the rows of its cache."""

    image_tower: ImageEncoder
    text_tower: TextTower

    def __init__(self, experiment: Experiment, total_steps: int):
        """Take the experiment; the towers are built once the tokenizer is known, in `configure_model`."""
        super().__init__()
        self._experiment, self._total_steps = experiment, total_steps
        self.clock = Clock()
        # t' and b stay float32 and outside weight decay: bare parameters are never decayed (siglit.training.optim).
        self.log_scale = nn.Parameter(torch.tensor(math.log(experiment.loss.logit_scale)))
        with_bias = experiment.loss.name == "sigmoid"
        self.logit_bias = nn.Parameter(torch.tensor(float(experiment.loss.logit_bias)), requires_grad=with_bias)
        self._description: dict[str, Any] = {}
        self._val: Sample | None = None

    def on_fit_start(self) -> None:
        """Refuse what looks like a larger batch and is none.

        Raises:
            UserError: Lightning is to add up the gradients of several batches.
        """
        if self.trainer.accumulate_grad_batches > 1:
            raise UserError(
                f"accumulate_grad_batches is {self.trainer.accumulate_grad_batches}: pairs of different batches would "
                "never meet in a contrastive loss. Raise train.batch_size and set train.micro_batch_size instead"
            )

    def configure_model(self) -> None:
        """Build the towers once the tokenizer is known, and share them out if the strategy asks for it."""
        if not hasattr(self, "text_tower"):
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self.build(data)
            if self.device_mesh is not None:
                shard(self, self.device_mesh["data_parallel"])

    def build(self, data: TrainDataModule) -> None:
        """Build the towers for each other and for the tokenizer."""
        self.image_tower, identity = data.image_encoder()
        built: dict[str, Any] = {
            "vocab_size": data.tokenizer.vocab_size,
            "length": data.tokenizer.length,
            "eos_id": data.tokenizer.eos_id,
            "pad_id": data.tokenizer.pad_id,
            "dim": self.image_tower.dim,
        }
        self.text_tower = TextTower(self._experiment.text_tower, **built)
        self._description = {
            "mode": self._experiment.mode,
            "text_tower": asdict(self._experiment.text_tower),
            "built_for": built | {"architecture": self.text_tower.architecture},
            "tokenizer": data.tokenizer.fingerprint,
            "image_tower": identity,
            "image_head": self._experiment.image_tower.head,
            "optimizer": self._experiment.optim.name,
            "batch_size": self._experiment.train.batch_size,
            "seed": self._experiment.seed,
        }
        if self._experiment.train.compile:
            for tower in (self.image_tower, self.text_tower):
                tower.compile()

    def on_train_start(self) -> None:
        """Take rates and decay from the experiment, also where a checkpoint has others; tell of the text tower."""
        self._ask_optimizer()
        if self.trainer.is_global_zero and self.text_tower.summary:
            _logger.info(self.text_tower.summary)

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        """Loss of this rank's part of the global batch."""
        zimg, ztxt = self.embed(batch)
        if torch.is_autocast_enabled(self.device.type) and torch.get_autocast_dtype(self.device.type) == torch.bfloat16:
            # Half the bytes to send, and fast products; logits and sums stay float32 (siglit.loss).
            zimg, ztxt = zimg.bfloat16(), ztxt.bfloat16()
        logged = is_logged(self.trainer)
        statistics: dict[str, torch.Tensor] | None = {} if logged else None
        with self.clock("loss"):
            loss = self._loss(zimg, ztxt, batch, statistics)
        if logged:  # the ranks have to sum up for each row
            self._log(loss, statistics or {})
        return loss

    def _log(self, loss: torch.Tensor, statistics: dict[str, torch.Tensor]) -> None:
        self.log("train/loss", loss, sync_dist=True)
        self.log_dict(
            {
                **{f"train/{name}": statistics[name] for name in _WATCHED if name in statistics},
                "train/lr": self._experiment.optim.lr * self._share_of_peak(self.trainer.global_step),
                "train/logit_scale": unsharded(self.log_scale.detach()).exp(),
                "train/logit_bias": unsharded(self.logit_bias.detach()),
            }
        )

    def embed(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, D) float32 unit rows of the images and of the texts."""
        zimg = F.normalize(self._embed(self.image_tower, batch["image"]).float(), dim=1)
        return zimg, F.normalize(self._embed(self.text_tower, batch["ids"], is_last=True).float(), dim=1)

    def _embed(
        self, tower: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, is_last: bool = False
    ) -> torch.Tensor:
        """Embed (B, …) inputs as (B, D), in micro-batches if asked for, which backward computes again.

        The very last one is kept: backward begins with it, and would make room for it at once.
        """
        parts = inputs.split(self._experiment.train.micro_batch_size or len(inputs))
        again = len(parts) - (is_last or len(parts) == 1)
        remade = [checkpoint(tower, part, use_reentrant=False) for part in parts[:again]]
        found = [*remade, *(tower(part) for part in parts[again:])]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _loss(
        self, zimg: torch.Tensor, ztxt: torch.Tensor, batch: Batch, statistics: dict[str, torch.Tensor] | None
    ) -> torch.Tensor:
        config = self._experiment.loss
        scale = unsharded(self.log_scale).exp()
        if config.name == "softmax":
            return softmax_loss(zimg, ztxt, scale, exchange=config.exchange, chunk_size=config.chunk_size)
        negatives = None
        if config.negatives != "all":
            assert config.negatives_per_positive is not None
            negatives = Negatives(config.negatives, config.negatives_per_positive, seed=self.trainer.global_step)
        ambiguous = config.ambiguous
        return sigmoid_loss(
            zimg,
            ztxt,
            scale,
            unsharded(self.logit_bias),
            exchange=config.exchange,
            chunk_size=config.chunk_size,
            negatives=negatives,
            image_ids=None if ambiguous == "negative" else batch["image_ids"],
            text_ids=None if ambiguous == "negative" else batch["text_ids"],
            ambiguous="drop" if ambiguous == "negative" else ambiguous,
            statistics=statistics,
        )

    def validation_step(self, *_: Any) -> None:
        """Retrieval on the held-out sample: each rank embeds its share, and all ranks get the same figures."""
        if self.trainer.datamodule.val is None:  # type: ignore[attr-defined]
            return  # Lightning comes here all the same: the hooks around it are where checkpoints are made
        if self._val is None:
            self._val = self.trainer.datamodule.val_sample()  # type: ignore[attr-defined]
        images, ids, image_of_text = self._val
        # Each distinct caption once, and before they are shared out: ranks of a sharded tower make its passes together.
        distinct, number = np.unique(ids, axis=0, return_inverse=True)
        zimg = self._shared(self.image_tower, images, "images")
        ztxt = self._shared(self.text_tower, distinct.astype(np.int64), "captions")[number.reshape(-1)]
        metrics = retrieval_metrics(zimg, ztxt, image_of_text, device=self.device, quiet=True)
        recall = {f"val/{name}": value for name, value in metrics.items() if "/R@" in name}
        self.log_dict(recall, batch_size=1, sync_dist=True)

    def _shared(self, tower: Callable[[torch.Tensor], torch.Tensor], inputs: np.ndarray, told: str) -> np.ndarray:
        """Embed (N, …) inputs, an equal share on each rank."""
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        share = -(-len(inputs) // ranks)
        mine = inputs[np.minimum(np.arange(rank * share, (rank + 1) * share), len(inputs) - 1)]
        size, device = self._experiment.eval.batch_size, self.device
        # Compiling for other shapes and without gradients would take longer than it saves.
        with torch.compiler.set_stance("force_eager"):
            found = encode(tower, mine, batch_size=size, device=device, unit=told, quiet=True)
        return gather_rows(torch.from_numpy(found).to(device)).cpu().numpy()[: len(inputs)]

    def configure_optimizers(self) -> Any:
        """The experiment's optimiser, its rate set anew before every step."""
        optimizer = build_optimizer(self, self._experiment.optim, self.multipliers())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_peak)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _ask_optimizer(self) -> None:
        """Put the experiment's numbers in place of those that a checkpoint's optimiser and schedule brought along."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        asked = build_optimizer(self, self._experiment.optim, self.multipliers()).param_groups
        share = self._share_of_peak(self.trainer.global_step)
        for group, own in zip(optimizer.param_groups, asked, strict=True):  # type: ignore[union-attr]
            numbers = {name: value for name, value in own.items() if name != "params"}
            group |= {**numbers, "initial_lr": own["lr"], "lr": own["lr"] * share}
        schedule.base_lrs = [group["lr"] for group in asked]

    def _learning(self) -> list[list[str]]:
        """Names of the parameters of each of the optimiser's groups: its state is kept by their order."""
        groups = parameter_groups(self, self._experiment.optim, self.multipliers())
        names = {parameter: name for name, parameter in self.named_parameters()}
        return [[names[parameter] for parameter in group["params"]] for group in groups]

    def multipliers(self) -> dict[str, float]:
        """Names of the parameters that came pretrained, each with its multiplier of the learning rate."""
        config = self._experiment.optim
        image = {f"image_tower.{name}": config.image_lr_multiplier for name in self.image_tower.pretrained}
        return image | {f"text_tower.{name}": config.text_lr_multiplier for name in self.text_tower.pretrained}

    def unused(self) -> list[str]:
        """Names of the parameters that the towers never read; they are frozen."""
        image = [f"image_tower.{name}" for name in self.image_tower.unused]
        return image + [f"text_tower.{name}" for name in self.text_tower.unused]

    def _share_of_peak(self, step: int) -> float:
        return lr_multiplier(step, self._experiment.optim, self._total_steps, self._experiment.train.batch_size)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with a run that was another.

        Raises:
            UserError: the checkpoint's towers, tokenizer, optimiser, batch size or seed are not the experiment's.
        """
        made = checkpoint.get("siglit", {})
        for name, asked in self._description.items():
            if made.get(name) != asked:
                told, before, now = _difference(name, made.get(name), asked)
                raise UserError(
                    f"cannot resume: the checkpoint was made with {told} {before}, the experiment asks for {now}; "
                    "change it back, or choose another --output_dir"
                )
        _drop_unused(checkpoint, self.unused())
        if made.get("learning") != self._learning():
            raise UserError(
                "cannot resume: the checkpoint's optimiser has its parameters in other groups; set loss.name, "
                "optim.decay_pretrained, optim.image_lr_multiplier and optim.text_lr_multiplier back, or choose "
                "another --output_dir"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in plain types how to rebuild the tower and which towers and tokenizer it belongs to."""
        experiment = plain(self._experiment)
        checkpoint["siglit"] = self._description | {"learning": self._learning(), "experiment": experiment}


def _drop_unused(checkpoint: dict[str, Any], unused: list[str]) -> None:
    """Take parameters that are never read out of a checkpoint's optimiser: earlier commits put them into its groups.

    They never had a gradient, so it has no state of them and never changed them.
    """
    learning = checkpoint.get("siglit", {}).get("learning")
    if not learning or not {*unused} & {name for names in learning for name in names}:
        return
    optimizer = checkpoint["optimizer_states"][0]
    kept = []
    for names, group in zip(learning, optimizer["param_groups"], strict=True):
        numbers = [n for n, name in zip(group["params"], names, strict=True) if name not in unused]
        if numbers:
            kept.append({**group, "params": numbers})
    optimizer["param_groups"] = kept
    learned = ([name for name in names if name not in unused] for names in learning)
    checkpoint["siglit"]["learning"] = [names for names in learned if names]


def _difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """What to tell of two values that differ: of two dictionaries, the first entry that does."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in [*now, *before] if before.get(key) != now.get(key))
        return _difference(f"{name}.{key}", before.get(key), now.get(key))
    return name, before, now
