"""Both towers and the loss as a LightningModule.

Decides what a checkpoint says of towers and experiment. Knows the experiment, but neither files nor commands; batches
come from `siglit.training.data`. The mode changes the image encoder and the batches, nothing else. Shapes: B pairs per
rank, L tokens, D embedding width.
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
from typing_extensions import override

from siglit.config import Experiment, plain
from siglit.data.epoch_loader import Batch
from siglit.errors import UserError
from siglit.evaluation.encoding import encode
from siglit.evaluation.retrieval import retrieval_metrics
from siglit.loss import Negatives, sigmoid_loss, softmax_loss
from siglit.loss.agreement import Agreement
from siglit.loss.exchange import gather_rows
from siglit.models.image_tower import ImageEncoder
from siglit.models.text_tower import TextTower
from siglit.runtime.matmul import matmul_precision
from siglit.training.data import TrainDataModule, ValidationSample
from siglit.training.fsdp import shard, unsharded
from siglit.training.lightning_internals import is_logged_step
from siglit.training.monitor import StepTimer
from siglit.training.optim import build_optimizer, lr_multiplier, parameter_groups

_logger = logging.getLogger(__name__)

_LOGGED_STATISTICS = ("positive_logit", "negative_logit", "positive_share")
"""Statistics of the loss that are logged, see `sigmoid_loss`."""


class SigLiT(pl.LightningModule):
    """Two towers trained with the sigmoid loss; in mode locked, the rows of the cache stand for the image tower."""

    image_tower: ImageEncoder
    text_tower: TextTower

    def __init__(self, experiment: Experiment, total_steps: int):
        """Take the experiment and its optimizer steps; `configure_model` builds the towers for the tokenizer."""
        super().__init__()
        self._experiment, self._total_steps = experiment, total_steps
        self.step_timer = StepTimer()
        # t' and b stay float32 and outside weight decay: bare parameters are never decayed (siglit.training.optim).
        self.log_scale = nn.Parameter(torch.tensor(math.log(experiment.loss.logit_scale)))
        bias = experiment.initial_bias
        self.logit_bias = nn.Parameter(torch.tensor(bias or 0.0), requires_grad=bias is not None)
        self._description: dict[str, Any] = {}
        self._val: ValidationSample | None = None
        self._agreement = Agreement()

    @override
    def on_fit_start(self) -> None:
        """Refuse gradient accumulation, which does not make the batch of a contrastive loss larger.

        Raises:
            UserError: accumulate_grad_batches is more than 1.
        """
        if self.trainer.accumulate_grad_batches > 1:
            raise UserError(
                f"accumulate_grad_batches is {self.trainer.accumulate_grad_batches}: pairs of different batches would "
                "never meet in a contrastive loss. Raise train.batch_size and set train.micro_batch_size instead"
            )

    @override
    def configure_model(self) -> None:
        """Build the towers for the tokenizer of the data, and shard them where the strategy has a device mesh."""
        if not hasattr(self, "text_tower"):
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self.build(data)
            if self.device_mesh is not None:
                shard(self, self.device_mesh["data_parallel"])

    def build(self, data: TrainDataModule) -> None:
        """Build the image encoder of `data`, and a text tower of the same width for its tokenizer."""
        self.image_tower, identity = data.image_encoder()
        built_for: dict[str, Any] = {
            "vocab_size": data.tokenizer.vocab_size,
            "length": data.tokenizer.length,
            "eos_id": data.tokenizer.eos_id,
            "pad_id": data.tokenizer.pad_id,
            "dim": self.image_tower.dim,
        }
        self.text_tower = TextTower(self._experiment.text_tower, **built_for)
        self._description = {
            "mode": self._experiment.mode,
            "text_tower": asdict(self._experiment.text_tower),
            "built_for": built_for | {"architecture": self.text_tower.architecture},
            "tokenizer": data.tokenizer.fingerprint,
            "image_tower": identity,
            "image_head": self._experiment.image_tower.head,
            # A checkpoint of an earlier siglit lacks the entry, which equals None; its rows were not centered.
            "image_center": self._experiment.image_tower.center or None,
            "optimizer": self._experiment.optim.name,
            "batch_size": self._experiment.train.batch_size,
            "seed": self._experiment.seed,
        }
        if self._experiment.train.compile:
            for tower in (self.image_tower, self.text_tower):
                tower.compile()

    @override
    def on_train_start(self) -> None:
        """Set learning rates and decay to the experiment's, also after a checkpoint was loaded."""
        self._reset_optimizer_hparams()
        if self.trainer.is_global_zero and self.text_tower.summary:
            _logger.info(self.text_tower.summary)

    @override
    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        """Loss of this rank's part of the global batch."""
        zimg, ztxt = self.embed(batch)
        if torch.is_autocast_enabled(self.device.type):
            # Half the bytes to exchange, and fast matrix products; logits and sums stay float32 (siglit.loss).
            half = torch.get_autocast_dtype(self.device.type)
            zimg, ztxt = zimg.to(half), ztxt.to(half)
        logged = is_logged_step(self.trainer)
        statistics: dict[str, torch.Tensor] | None = {} if logged else None
        with self.step_timer("loss"):
            loss = self._loss(zimg, ztxt, batch, statistics)
        if logged:  # a logged loss is averaged over the ranks
            self._log(loss, statistics or {})
        return loss

    def _log(self, loss: torch.Tensor, statistics: dict[str, torch.Tensor]) -> None:
        self.log("train/loss", loss, sync_dist=True)
        self.log_dict(
            {
                **{f"train/{name}": statistics[name] for name in _LOGGED_STATISTICS if name in statistics},
                "train/lr": self._experiment.optim.lr * self._lr_multiplier(self.trainer.global_step),
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
        """Embed (B, …) inputs as (B, D), in micro-batches if train.micro_batch_size is set.

        Backward computes the micro-batches again. It starts with the very last one (`is_last`), whose activations are
        kept: they would be computed again at once.
        """
        parts = inputs.split(self._experiment.train.micro_batch_size or len(inputs))
        recomputed = len(parts) - (1 if is_last or len(parts) == 1 else 0)
        rows = [checkpoint(tower, part, use_reentrant=False) for part in parts[:recomputed]]
        rows += [tower(part) for part in parts[recomputed:]]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _loss(
        self, zimg: torch.Tensor, ztxt: torch.Tensor, batch: Batch, statistics: dict[str, torch.Tensor] | None
    ) -> torch.Tensor:
        config = self._experiment.loss
        scale = unsharded(self.log_scale).exp()
        if config.name == "softmax":
            return softmax_loss(
                zimg,
                ztxt,
                scale,
                exchange=config.exchange,
                chunk_size=config.chunk_size,
                agreement=self._agreement,
            )
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
            agreement=self._agreement,
        )

    @override
    def validation_step(self, *_: Any) -> None:
        """Log R@K on the held-out sample: each rank embeds its share, and all ranks compute the same metrics."""
        if self.trainer.datamodule.val is None:  # type: ignore[attr-defined]
            return  # Lightning validates all the same, because the hooks around validation save the checkpoints
        if self._val is None:
            self._val = self.trainer.datamodule.val_sample()  # type: ignore[attr-defined]
        images, ids, image_of_text = self._val
        # Captions are deduplicated before they are split over the ranks: all ranks of a sharded tower must run the same
        # number of forward passes.
        distinct, inverse = np.unique(ids, axis=0, return_inverse=True)
        zimg = self._embed_share_and_gather(self.image_tower, images, "images")
        ztxt = self._embed_share_and_gather(self.text_tower, distinct.astype(np.int64), "captions")
        ztxt = ztxt[inverse.reshape(-1)]
        with matmul_precision("highest"):  # scores in TF32 would have other ranks
            metrics = retrieval_metrics(zimg, ztxt, image_of_text, device=self.device, quiet=True)
        recall = {f"val/{name}": value for name, value in metrics.items() if "/R@" in name}
        self.log_dict(recall, batch_size=1, sync_dist=True)

    def _embed_share_and_gather(
        self, tower: Callable[[torch.Tensor], torch.Tensor], inputs: np.ndarray, unit: str
    ) -> np.ndarray:
        """Embed (N, …) inputs as (N, D) unit rows: each rank an equal share, then all ranks get all rows."""
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        share = -(-len(inputs) // ranks)
        mine = inputs[np.minimum(np.arange(rank * share, (rank + 1) * share), len(inputs) - 1)]
        size, device = self._experiment.eval.batch_size, self.device
        # Compiling for other shapes and without gradients would take longer than it saves.
        with torch.compiler.set_stance("force_eager"):
            rows = encode(tower, mine, batch_size=size, device=device, unit=unit, quiet=True)
        return gather_rows(torch.from_numpy(rows).to(device)).cpu().numpy()[: len(inputs)]

    @override
    def configure_optimizers(self) -> Any:
        """Build the experiment's optimizer, and its schedule, which sets the learning rate before every step."""
        optimizer = build_optimizer(self, self._experiment.optim, self.multipliers())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_multiplier)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _reset_optimizer_hparams(self) -> None:
        """Replace the hyperparameters that optimizer and schedule have from a checkpoint by the experiment's."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        expected = build_optimizer(self, self._experiment.optim, self.multipliers()).param_groups
        multiplier = self._lr_multiplier(self.trainer.global_step)
        for group, own in zip(optimizer.param_groups, expected, strict=True):  # type: ignore[union-attr]
            hparams = {name: value for name, value in own.items() if name != "params"}
            group |= {**hparams, "initial_lr": own["lr"], "lr": own["lr"] * multiplier}
        schedule.base_lrs = [group["lr"] for group in expected]

    def _lr_multiplier(self, step: int) -> float:
        return lr_multiplier(step, self._experiment.optim, self._total_steps, self._experiment.train.batch_size)

    def _trainable_names(self) -> list[list[str]]:
        """Names of the parameters in each group of the optimizer, which keeps its state in their order."""
        groups = parameter_groups(self, self._experiment.optim, self.multipliers())
        names = {parameter: name for name, parameter in self.named_parameters()}
        return [[names[parameter] for parameter in group["params"]] for group in groups]

    def multipliers(self) -> dict[str, float]:
        """{name of each pretrained parameter: its multiplier of the learning rate}."""
        config = self._experiment.optim
        image = {f"image_tower.{name}": config.image_lr_multiplier for name in self.image_tower.pretrained}
        return image | {f"text_tower.{name}": config.text_lr_multiplier for name in self.text_tower.pretrained}

    def unused(self) -> list[str]:
        """Names of the parameters that the towers never read; they are frozen."""
        image = [f"image_tower.{name}" for name in self.image_tower.unused]
        return image + [f"text_tower.{name}" for name in self.text_tower.unused]

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another run.

        Raises:
            UserError: mode, towers, tokenizer, optimizer, its parameter groups, batch size or seed of the checkpoint
                are not the experiment's.
        """
        saved = checkpoint.get("siglit")
        saved = saved if isinstance(saved, dict) else {}
        for name, expected in self._description.items():
            if saved.get(name) != expected:
                label, before, now = _first_difference(name, saved.get(name), expected)
                raise UserError(
                    f"cannot resume: the checkpoint was made with {label} {before}, but the experiment has {now}; "
                    "change it back, or choose another --output_dir"
                )
        _drop_unused(checkpoint, self.unused())
        if saved.get("learning") != self._trainable_names():
            raise UserError(
                "cannot resume: the checkpoint's optimizer has its parameters in other groups; set loss.name, "
                "loss.logit_bias, optim.decay_pretrained, optim.image_lr_multiplier and optim.text_lr_multiplier back, "
                "or choose another --output_dir"
            )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add, in plain types, what is needed to rebuild the text tower and to recognize image tower and tokenizer.

        Raises:
            RuntimeError: the ranks' batches differed in the last step, so that its result is wrong.
        """
        problem = self._agreement.last()
        if problem is not None:
            raise RuntimeError(problem)
        experiment = plain(self._experiment)
        checkpoint["siglit"] = self._description | {"learning": self._trainable_names(), "experiment": experiment}


def _drop_unused(checkpoint: dict[str, Any], unused: list[str]) -> None:
    """Remove parameters that the towers never read from the optimizer of an earlier siglit's checkpoint.

    They never had a gradient, so the optimizer has no state of them and never changed them.
    """
    trainable = checkpoint.get("siglit", {}).get("learning")
    if not trainable or not {*unused} & {name for names in trainable for name in names}:
        return
    optimizer = checkpoint["optimizer_states"][0]
    groups = []
    for names, group in zip(trainable, optimizer["param_groups"], strict=True):
        indices = [index for index, name in zip(group["params"], names, strict=True) if name not in unused]
        if len(indices) > 0:
            groups.append({**group, "params": indices})
    optimizer["param_groups"] = groups
    used = ([name for name in names if name not in unused] for names in trainable)
    checkpoint["siglit"]["learning"] = [names for names in used if len(names) > 0]


def _first_difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """Dotted name and both values of what differs; of two dictionaries, of the first entry that does."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in [*now, *before] if before.get(key) != now.get(key))
        return _first_difference(f"{name}.{key}", before.get(key), now.get(key))
    return name, before, now
