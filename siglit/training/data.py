"""What training reads, for Lightning: batches and a held-out sample, of the cache or of the images themselves.

Shapes: I images, T captions, L tokens, D embedding width, H × W the tower's input.
"""

import itertools
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from siglit.config import Experiment
from siglit.data.cache_loader import CacheLoader
from siglit.data.corruption import corruption_of, noise_pool
from siglit.data.decoding import Decoder, UnitPixels, pixel_batches
from siglit.data.image_loader import ImageLoader
from siglit.data.shuffle import choose_image_shuffle, choose_shuffle
from siglit.data.sources import open_source
from siglit.data.tokens import token_ids
from siglit.errors import UserError
from siglit.models.image_tower import ImageEncoder, ImageTower
from siglit.models.tokenizer import Tokenizer, load_tokenizer
from siglit.runs.caches import open_cache
from siglit.runs.folder import output_dir
from siglit.runs.launch import is_first_process
from siglit.runs.tokenizer import ensure_tokenizer, tokenizer_path
from siglit.runtime import machine

_logger = logging.getLogger(__name__)

Sample = tuple[np.ndarray, np.ndarray, np.ndarray]
"""What validation embeds: (I, …) input of the image side, (T, L) token ids, (T,) image of each text."""


class TrainDataModule(pl.LightningDataModule, ABC):
    """What both kinds share: the first rank trains a missing tokenizer while the others wait.

    Attributes:
        count: images with captions to train on.
        tokenizer: known after `setup`.
    """

    tokenizer: Tokenizer
    count: int

    def __init__(self, experiment: Experiment):
        """Take the experiment."""
        super().__init__()
        self._experiment = experiment
        self._batches: Any = None
        self._chosen, self._reason = "", ""

    @abstractmethod
    def captions(self) -> Iterable[str]:
        """All captions to train on."""

    @abstractmethod
    def image_encoder(self) -> tuple[ImageEncoder, dict[str, Any]]:
        """Build the image side that takes these batches; and what its embeddings start from, as a fingerprint."""

    def prepare_data(self) -> None:
        """Train the tokenizer if there is none."""
        ensure_tokenizer(self._experiment, self.captions())

    def setup(self, stage: str) -> None:
        """Load the tokenizer on every rank."""
        self.tokenizer = load_tokenizer(tokenizer_path(self._experiment), self._experiment.tokenizer)

    def val_dataloader(self) -> list[int]:
        """One empty step: the whole sample is embedded at once, see the module."""
        return [0]

    def shuffle_message(self) -> str:
        """How the pairs are shuffled and why, once the position of a resumed run is known."""
        assert self._batches is not None
        why = self._reason if self._batches.shuffle == self._chosen else "as before the run was resumed"
        return f"shuffling {self._batches.shuffle} (train.shuffle {self._experiment.train.shuffle}; {why})"

    def _ranks(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {
            "batch_size": self._experiment.train.batch_size,
            "seed": self._experiment.seed,
            "rank": self.trainer.global_rank,
            "world_size": self.trainer.world_size,
            "pin_memory": self.trainer.strategy.root_device.type == "cuda",
        }


class CacheDataModule(TrainDataModule):
    """Rows of the caches, and token ids beside them: no image is decoded."""

    def __init__(self, experiment: Experiment):
        """Open the caches.

        Raises:
            UserError: there are none, or they do not fit the experiment or each other.
        """
        super().__init__(experiment)
        self.train = open_cache(experiment, "train")
        self.val = open_cache(experiment, "val") if experiment.data.val is not None else None
        if self.val is not None and self.val.fingerprint["image_tower"] != self.train.fingerprint["image_tower"]:
            raise UserError(
                f"{self.train.path} and {self.val.path} were made by different image towers; "
                "run `siglit precompute` again"
            )
        offsets = self.train.caption_offsets
        self.count = int((offsets[1:] > offsets[:-1]).sum())

    def captions(self) -> Iterable[str]:
        """All captions of the training cache."""
        return self.train.iter_captions()

    def image_encoder(self) -> tuple[ImageEncoder, dict[str, Any]]:
        """The cached rows, behind a head if there is one."""
        side = ImageEncoder(None, width=self.train.dim, head=self._experiment.image_tower.head)
        return side, self.train.fingerprint["image_tower"]

    def prepare_data(self) -> None:
        """Also write the token ids beside the caches."""
        super().prepare_data()
        path = tokenizer_path(self._experiment)
        token_ids(self.train, load_tokenizer(path, self._experiment.tokenizer))
        self._noise()

    def train_dataloader(self) -> CacheLoader:
        """This rank's part of the global batches."""
        assert self.trainer is not None
        if self._batches is None:
            shuffle = self._experiment.train.shuffle
            # One choice for all ranks: their machines may differ in the memory that is free.
            chosen, self._reason = self.trainer.strategy.broadcast(choose_shuffle(self.train))
            self._chosen = chosen if shuffle == "auto" else shuffle
            labels = self.train.labels if self._experiment.loss.same == "label" else None
            self._batches = CacheLoader(
                self.train,
                token_ids(self.train, self.tokenizer),
                labels=labels,
                shuffle=self._chosen,
                auto_shuffle=shuffle == "auto",
                corruption=corruption_of(self._experiment.data, self._experiment.seed, self.tokenizer),
                noise=self._noise(),
                **self._ranks(),
            )
        return self._batches

    def _noise(self) -> np.ndarray | None:
        """Embeddings of noise images for the noise study: made on the first process, read by the others."""
        if "image" not in self._experiment.data.corrupt:
            return None
        made = self.train.fingerprint["image_tower"]
        tower = ImageTower(self._experiment.image_tower)
        if tower.fingerprint()["weights"] != made.get("weights"):
            raise UserError(
                f"data.corrupt has image, but the image tower of the experiment is not the one that made "
                f"{self.train.path}: noise images need the same weights; see image_tower.weights"
            )

        def embed(pixels: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return tower(torch.from_numpy(pixels)).float().numpy()

        folder = output_dir(self._experiment)
        options = {"image_size": tower.image_size, "dim": self.train.dim, "seed": self._experiment.seed}
        return noise_pool(folder, made, embed, **options)

    def val_sample(self) -> Sample:
        """First rows of the held-out cache."""
        assert self.val is not None
        rows = min(self._experiment.train.val_rows, len(self.val))
        texts = int(self.val.caption_offsets[rows])
        captions = [self.val.caption(number) for number in range(texts)]
        image_of_text = np.repeat(np.arange(rows), np.diff(self.val.caption_offsets[: rows + 1]))
        return self.val.gather(np.arange(rows)), self.tokenizer(captions), image_of_text


class ImageDataModule(TrainDataModule):
    """Images, decoded while the tower learns."""

    def __init__(self, experiment: Experiment):
        """Open the sources.

        Raises:
            UserError: they cannot be read.
        """
        super().__init__(experiment)
        self.train = open_source(experiment.data.train)
        self.val = open_source(experiment.data.val) if experiment.data.val is not None else None
        self.count = sum(1 for several in self.train.captions() if several)
        self._side: tuple[ImageEncoder, dict[str, Any]] | None = None

    def captions(self) -> Iterable[str]:
        """All captions of the training source."""
        return itertools.chain.from_iterable(self.train.captions())

    def image_encoder(self) -> tuple[ImageEncoder, dict[str, Any]]:
        """The whole tower, from its pretrained weights or from random ones."""
        if self._side is None:
            config = self._experiment.image_tower
            if self._experiment.mode == "scratch":
                config = replace(config, pretrained=False, weights=None)
            elif not config.pretrained and config.weights is None:
                raise UserError(
                    "mode is unlocked, but image_tower.pretrained is false and there are no image_tower.weights: give "
                    "what the tower is to start from, or set mode: scratch"
                )
            tower = ImageTower(config, trainable=True)
            side = ImageEncoder(tower, width=tower.embedding_width, head=config.head)
            # Random weights are no part of what a run started from: the seed is.
            started = tower.fingerprint() | ({"weights": None} if self._experiment.mode == "scratch" else {})
            # A position counts the rows of this listing and of no other.
            identity = started | {"source": self.train.identity()}
            self._side = side, identity
        return self._side

    def train_dataloader(self) -> ImageLoader:
        """This rank's part of the global batches."""
        if self._batches is None:
            self._batches = self._open_batches()
        return self._batches

    def teardown(self, stage: str) -> None:
        """End the worker processes; tell of unusable images, once."""
        if self._batches is None:
            return
        self._batches.close()
        skipped, self._batches.skipped = self._batches.skipped, Counter()
        if skipped and is_first_process():
            reasons = "; ".join(f"{count} {reason}" for reason, count in skipped.most_common(5))
            _logger.warning(
                f"{skipped.total():,} of {self._batches.seen:,} images (of this process) could not be used and others "
                f"took their places: {reasons}"
            )

    def val_sample(self) -> Sample:
        """First usable images of the held-out source."""
        assert self.val is not None
        wanted = self._experiment.train.val_rows
        pixels, captions = [], []
        for batch in pixel_batches(self._decoding(), self._workers(), pin_memory=False):
            pixels.append(batch.pixels.numpy())
            captions += [sample.captions for sample in batch.samples]
            if len(captions) >= wanted:
                break
        if not captions:
            raise UserError(
                f"{self.val.name} has no usable image with a caption to validate on; mend data.val, or leave it out"
            )
        texts = [caption for several in captions[:wanted] for caption in several]
        image_of_text = np.repeat(np.arange(len(captions[:wanted])), [len(several) for several in captions[:wanted]])
        return np.concatenate(pixels)[:wanted], self.tokenizer(texts), image_of_text

    def _open_batches(self) -> ImageLoader:
        assert self.trainer is not None
        tower, config = self._tower(), self._experiment.data
        decoder = Decoder(
            # A random crop is the only one: what it leaves is squashed.
            tower.transform(squash=config.random_crop is not None),
            image_size=tower.image_size,
            max_pixels=config.max_image_pixels,
            draft=tower.draft(),
            crop=config.random_crop,
            flip=config.random_flip,
        )
        shuffle = self._experiment.train.shuffle
        # One choice for all ranks: their machines may differ in the memory that is free.
        here = choose_image_shuffle(self.train, self._experiment.train.devices)
        chosen, self._reason = self.trainer.strategy.broadcast(here)
        self._chosen = chosen if shuffle == "auto" else shuffle
        return ImageLoader(
            self.train,
            self.tokenizer,
            decoder,
            workers=self._workers(),
            max_skipped=config.max_skipped,
            labels=self._experiment.loss.same == "label",
            shuffle=self._chosen,
            auto_shuffle=shuffle == "auto",
            corruption=corruption_of(config, self._experiment.seed, self.tokenizer),
            **self._ranks(),
        )

    def _decoding(self) -> UnitPixels:
        assert self.val is not None
        tower = self._tower()
        size = self._experiment.cache.batch_size
        units = self.val.units(size)
        most = self._experiment.data.max_image_pixels
        return UnitPixels(self.val, units, tower.transform(), size, most, tower.draft())

    def _tower(self) -> ImageTower:
        tower = self.image_encoder()[0].tower
        assert tower is not None
        return tower

    def _workers(self) -> int:
        if self._experiment.data.workers is not None:
            return self._experiment.data.workers
        return machine.default_workers(self._experiment.train.devices)


def open_data(experiment: Experiment) -> CacheDataModule | ImageDataModule:
    """Open what the experiment's mode reads.

    Raises:
        UserError: it is missing, or does not fit.
    """
    return CacheDataModule(experiment) if experiment.mode == "locked" else ImageDataModule(experiment)
