"""The text tower, the sigmoid loss and the cache, put together for Lightning.

Knows the experiment; commands and files belong to the stages. Shapes: B pairs per rank, L tokens, D embedding width.
"""

import math
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from siglit.cache import EmbeddingCache
from siglit.config import Experiment
from siglit.data.batches import Batch, TrainBatches
from siglit.data.shuffle import choose_shuffle
from siglit.data.tokens import token_ids
from siglit.errors import UserError
from siglit.evaluation.encoding import encode_ids, unit_rows
from siglit.evaluation.retrieval import retrieval_metrics
from siglit.loss import Negatives, sigmoid_loss, softmax_loss
from siglit.loss.exchange import gather_rows
from siglit.models.text_tower import TextTower
from siglit.models.tokenizer import Tokenizer, load_tokenizer
from siglit.optim import build_optimizer, cosine_schedule
from siglit.run import ensure_tokenizer, tokenizer_path

_WATCHED = ("positive_logit", "negative_logit", "positive_share")
"""Statistics of the loss that are logged, see `sigmoid_loss`."""


class CacheData(pl.LightningDataModule):
    """Caches and token ids; the first rank trains a missing tokenizer and tokenises while the others wait."""

    tokenizer: Tokenizer

    def __init__(self, experiment: Experiment, train: EmbeddingCache, val: EmbeddingCache | None):
        """Take opened caches."""
        super().__init__()
        self._experiment = experiment
        self.train, self.val = train, val
        self._batches: TrainBatches | None = None
        self._chosen, self._reason = "", ""

    def prepare_data(self) -> None:
        """Train the tokenizer if there is none, and write the token ids beside the caches."""
        path = ensure_tokenizer(self._experiment, self.train.iter_captions())
        token_ids(self.train, load_tokenizer(path, self._experiment.tokenizer))

    def setup(self, stage: str) -> None:
        """Load the tokenizer on every rank."""
        self.tokenizer = load_tokenizer(tokenizer_path(self._experiment), self._experiment.tokenizer)

    def train_dataloader(self) -> TrainBatches:
        """This rank's part of the global batches."""
        assert self.trainer is not None
        if self._batches is None:
            shuffle = self._experiment.train.shuffle
            # One choice for all ranks: their machines may differ in the memory that is free.
            chosen, self._reason = self.trainer.strategy.broadcast(choose_shuffle(self.train))
            self._chosen = chosen if shuffle == "auto" else shuffle
            labels = self.train.labels if self._experiment.loss.same == "label" else None
            self._batches = TrainBatches(
                self.train,
                token_ids(self.train, self.tokenizer),
                labels=labels,
                batch_size=self._experiment.train.batch_size,
                seed=self._experiment.seed,
                shuffle=self._chosen,
                auto_shuffle=shuffle == "auto",
                rank=self.trainer.global_rank,
                world_size=self.trainer.world_size,
                pin_memory=self.trainer.strategy.root_device.type == "cuda",
            )
        return self._batches

    def shuffle_told(self) -> str:
        """How the rows are shuffled and why, once the position of a resumed run is known."""
        assert self._batches is not None
        why = self._reason if self._batches.shuffle == self._chosen else "as before the run was resumed"
        return f"shuffling {self._batches.shuffle} (train.shuffle {self._experiment.train.shuffle}; {why})"

    def val_dataloader(self) -> list[int]:
        """One empty step: the whole set is embedded at once, see the module."""
        return [0]

    def val_sample(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First rows of the held-out cache: (I, D) unit rows, (T, L) token ids, (T,) image of each text."""
        assert self.val is not None
        rows = min(self._experiment.train.val_rows, len(self.val))
        texts = int(self.val.caption_offsets[rows])
        captions = [self.val.caption(number) for number in range(texts)]
        image_of_text = np.repeat(np.arange(rows), np.diff(self.val.caption_offsets[: rows + 1]))
        return unit_rows(self.val.gather(np.arange(rows))), self.tokenizer(captions), image_of_text


class SigLiT(pl.LightningModule):
    """Locked-image tuning: the text tower learns to meet the cached image embeddings under the sigmoid loss."""

    tower: TextTower

    def __init__(self, experiment: Experiment, total_steps: int):
        """Take the experiment; the tower is built once the tokenizer is known, in `configure_model`."""
        super().__init__()
        self._experiment, self._total_steps = experiment, total_steps
        # t' and b stay float32 and outside weight decay: bare parameters are never decayed (siglit.optim).
        self.log_scale = nn.Parameter(torch.tensor(math.log(experiment.loss.logit_scale)))
        with_bias = experiment.loss.name == "sigmoid"
        self.logit_bias = nn.Parameter(torch.tensor(float(experiment.loss.logit_bias)), requires_grad=with_bias)
        self._description: dict[str, Any] = {}
        self._val: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

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
        """Build the text tower for the tokenizer and the width of the cache."""
        if hasattr(self, "tower"):
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        built = {
            "vocab_size": data.tokenizer.vocab_size,
            "length": data.tokenizer.length,
            "eos_id": data.tokenizer.eos_id,
            "pad_id": data.tokenizer.pad_id,
            "dim": data.train.dim,
        }
        self.tower = TextTower(self._experiment.text_tower, **built)
        self._description = {
            "text_tower": asdict(self._experiment.text_tower),
            "built_for": built,
            "tokenizer": data.tokenizer.fingerprint,
            "image_tower": data.train.fingerprint["image_tower"],
            "batch_size": self._experiment.train.batch_size,
            "seed": self._experiment.seed,
        }

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        """Loss of this rank's part of the global batch."""
        zimg = F.normalize(batch["image"].float(), dim=1)
        ztxt = F.normalize(self._embed(batch["ids"]).float(), dim=1)
        if torch.is_autocast_enabled(self.device.type) and torch.get_autocast_dtype(self.device.type) == torch.bfloat16:
            # Half the bytes to send, and fast products; logits and sums stay float32 (siglit.loss).
            zimg, ztxt = zimg.bfloat16(), ztxt.bfloat16()
        statistics: dict[str, torch.Tensor] = {}
        loss = self._loss(zimg, ztxt, batch, statistics)
        self.log("train/loss", loss, sync_dist=True)
        self.log_dict(
            {
                **{f"train/{name}": statistics[name] for name in _WATCHED if name in statistics},
                "train/lr": self.lr_schedulers().get_last_lr()[0],  # type: ignore[union-attr]
                "train/logit_scale": self.log_scale.detach().exp(),
                "train/logit_bias": self.logit_bias.detach(),
            }
        )
        return loss

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed (B, L) token ids as (B, D), in micro-batches if asked for, which backward computes again."""
        size = self._experiment.train.micro_batch_size
        if size is None or size >= len(ids):
            embedded: torch.Tensor = self.tower(ids)
            return embedded
        return torch.cat([checkpoint(self.tower, part, use_reentrant=False) for part in ids.split(size)])

    def _loss(
        self, zimg: torch.Tensor, ztxt: torch.Tensor, batch: Batch, statistics: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        config = self._experiment.loss
        scale = self.log_scale.exp()
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
            self.logit_bias,
            exchange=config.exchange,
            chunk_size=config.chunk_size,
            negatives=negatives,
            image_ids=None if ambiguous == "negative" else batch["image_ids"],
            text_ids=None if ambiguous == "negative" else batch["text_ids"],
            ambiguous="drop" if ambiguous == "negative" else ambiguous,
            statistics=statistics,
        )

    def validation_step(self, *_: Any) -> None:
        """Retrieval on the held-out sample: each rank embeds its share of the texts, all ranks get the same figures."""
        if self.trainer.datamodule.val is None:  # type: ignore[attr-defined]
            return  # Lightning comes here all the same: the hooks around it are where checkpoints are made
        if self._val is None:
            self._val = self.trainer.datamodule.val_sample()  # type: ignore[attr-defined]
        zimg, ids, image_of_text = self._val
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        share = -(-len(ids) // ranks)
        mine = ids[np.minimum(np.arange(rank * share, (rank + 1) * share), len(ids) - 1)]
        part = encode_ids(self.tower, mine, batch_size=self._experiment.eval.batch_size, device=self.device, quiet=True)
        ztxt = gather_rows(torch.from_numpy(part).to(self.device)).cpu().numpy()
        metrics = retrieval_metrics(zimg, ztxt[: len(ids)], image_of_text)
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """The experiment's optimiser, its rate set anew before every step."""
        config = self._experiment.optim
        optimizer = build_optimizer(self, config)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: cosine_schedule(step, config.warmup_steps, self._total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with a run that was another.

        Raises:
            UserError: the checkpoint's towers, tokenizer, batch size or seed are not the experiment's.
        """
        made = checkpoint.get("siglit", {})
        for name, asked in self._description.items():
            if made.get(name) != asked:
                raise UserError(
                    f"cannot resume: the checkpoint was made with {name} {made.get(name)}, the experiment asks for "
                    f"{asked}; change it back, or choose another --output_dir"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in plain types how to rebuild the tower and which towers and tokenizer it belongs to."""
        checkpoint["siglit"] = self._description
