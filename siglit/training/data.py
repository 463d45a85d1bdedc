"""LightningDataModules of training: batches and a validation sample, from the cache or from the images themselves.

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
from typing_extensions import override

from siglit.config import Experiment
from siglit.data.cache_loader import CacheLoader
from siglit.data.corruption import corruption_of, noise_pool
from siglit.data.decode_workers import Decoder, UnitPixels, pixel_batches
from siglit.data.image_loader import ImageLoader
from siglit.data.mean_row import mean_row
from siglit.data.shuffle import choose_image_shuffle, choose_shuffle
from siglit.data.sources import open_source
from siglit.data.tokens import token_ids
from siglit.errors import UserError
from siglit.models.image_tower import ImageEncoder, ImageTower
from siglit.models.tokenizer import Tokenizer, load_tokenizer
from siglit.runs.caches import open_cache
from siglit.runs.folder import ensure_folder
from siglit.runs.launch import is_first_process
from siglit.runs.tokenizer import ensure_tokenizer, tokenizer_path
from siglit.runtime import machine

_logger = logging.getLogger(__name__)

ValidationSample = tuple[np.ndarray, np.ndarray, np.ndarray]
"""What validation embeds: (I, …) inputs of the image encoder, (T, L) token ids, (T,) image of each text."""


class TrainDataModule(pl.LightningDataModule, ABC):
    """What both kinds have in common: the first rank trains a missing tokenizer while the others wait.

    Attributes:
        count: images with captions to train on.
        tokenizer: set by `setup`.
    """

    tokenizer: Tokenizer
    count: int

    def __init__(self, experiment: Experiment):
        """Take the experiment."""
        super().__init__()
        self._experiment = experiment
        self._loader: Any = None
        self._shuffle, self._shuffle_reason = "", ""

    @abstractmethod
    def captions(self) -> Iterable[str]:
        """All captions to train on."""

    @abstractmethod
    def image_encoder(self) -> tuple[ImageEncoder, dict[str, Any]]:
        """Build the image encoder for these batches; also return the fingerprint of the tower that it starts from."""

    def check_unchanged(self) -> None:
        """Check that the data is still what training began with; called before every checkpoint."""

    @override
    def prepare_data(self) -> None:
        """Train the tokenizer if there is none."""
        config, pretrained = self._experiment.tokenizer, self._experiment.text_tower.pretrained
        ensure_tokenizer(self._experiment.folder, config, pretrained, self.captions())

    @override
    def setup(self, stage: str) -> None:
        """Load the tokenizer on every rank."""
        self.tokenizer = self._load_tokenizer()

    def _load_tokenizer(self) -> Tokenizer:
        config, pretrained = self._experiment.tokenizer, self._experiment.text_tower.pretrained
        return load_tokenizer(tokenizer_path(self._experiment.folder, config, pretrained), config)

    @override
    def val_dataloader(self) -> list[int]:
        """One step without data: `SigLiT.validation_step` embeds the whole sample at once."""
        return [0]

    def shuffle_message(self) -> str:
        """How the pairs are shuffled and why; called once a checkpoint, if any, is loaded."""
        assert self._loader is not None
        reason = self._shuffle_reason if self._loader.shuffle == self._shuffle else "as before the run was resumed"
        return f"shuffling {self._loader.shuffle} (train.shuffle {self._experiment.train.shuffle}; {reason})"

    def _choose_shuffle(self, choice: tuple[str, str]) -> None:
        """Set the shuffle of train.shuffle, or where that is auto, the first rank's choice (shuffle, reason).

        The ranks' machines may differ in free memory, but all ranks must shuffle alike.
        """
        assert self.trainer is not None
        automatic, self._shuffle_reason = self.trainer.strategy.broadcast(choice)
        shuffle = self._experiment.train.shuffle
        self._shuffle = automatic if shuffle == "auto" else shuffle

    def _loader_options(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {
            "batch_size": self._experiment.train.batch_size,
            "shuffle": self._shuffle,
            "auto_shuffle": self._experiment.train.shuffle == "auto",
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
            UserError: a cache is missing or was made with another experiment, or the two with different image towers.
        """
        super().__init__(experiment)
        self.train = open_cache(experiment, "train")
        self.val = open_cache(experiment, "val") if experiment.data.val is not None else None
        if self.val is not None and self.val.fingerprint["image_tower"] != self.train.fingerprint["image_tower"]:
            raise UserError(
                f"{self.train.path} and {self.val.path} were made with different image towers; run `siglit precompute` "
                "again"
            )
        offsets = self.train.caption_offsets
        self.count = int((offsets[1:] > offsets[:-1]).sum())

    @override
    def captions(self) -> Iterable[str]:
        return self.train.iter_captions()

    @override
    def check_unchanged(self) -> None:
        """Check the shards that are mapped; see `EmbeddingCache.check_unchanged`.

        Raises:
            CacheError: one was damaged or overwritten.
        """
        self.train.check_unchanged()
        if self.val is not None:
            self.val.check_unchanged()

    @override
    def image_encoder(self) -> tuple[ImageEncoder, dict[str, Any]]:
        """An encoder of the cached rows, with a head if image_tower.head is set."""
        config = self._experiment.image_tower
        center = torch.from_numpy(mean_row(self.train)) if config.center else None
        encoder = ImageEncoder(None, width=self.train.dim, head=config.head, center=center)
        return encoder, self.train.fingerprint["image_tower"]

    @override
    def prepare_data(self) -> None:
        """Also write token ids and mean row beside the cache, and the noise for data.corrupt."""
        super().prepare_data()
        if self._experiment.image_tower.center:
            mean_row(self.train)
        token_ids(self.train, self._load_tokenizer())
        self._noise()

    @override
    def train_dataloader(self) -> CacheLoader:
        """This rank's part of the global batches."""
        if self._loader is None:
            self._choose_shuffle(choose_shuffle(self.train))
            labels = self.train.labels if self._experiment.loss.same == "label" else None
            self._loader = CacheLoader(
                self.train,
                token_ids(self.train, self.tokenizer),
                labels=labels,
                corruption=corruption_of(self._experiment.data, self._experiment.seed, self.tokenizer),
                noise=self._noise(),
                **self._loader_options(),
            )
        return self._loader

    def _noise(self) -> np.ndarray | None:
        """Embeddings of noise images for data.corrupt: the first process computes them, the others read them."""
        if "image" not in self._experiment.data.corrupt:
            return None
        fingerprint = self.train.fingerprint["image_tower"]
        tower = ImageTower(self._experiment.image_tower)
        if tower.fingerprint()["weights"] != fingerprint.get("weights"):
            raise UserError(
                f"data.corrupt has image, but the image tower of the experiment has other weights than the one of "
                f"{self.train.path}: noise images need the same weights; see image_tower.weights"
            )

        def embed(pixels: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return tower(torch.from_numpy(pixels)).float().numpy()

        folder = ensure_folder(self._experiment.folder)
        options = {"image_size": tower.image_size, "dim": self.train.dim, "seed": self._experiment.seed}
        return noise_pool(folder, fingerprint, embed, **options)

    def val_sample(self) -> ValidationSample:
        """The first train.val_rows rows of the cache of data.val."""
        assert self.val is not None
        rows = min(self._experiment.train.val_rows, len(self.val))
        texts = int(self.val.caption_offsets[rows])
        captions = [self.val.caption(index) for index in range(texts)]
        image_of_text = np.repeat(np.arange(rows), np.diff(self.val.caption_offsets[: rows + 1]))
        return self.val.gather(np.arange(rows)), self.tokenizer(captions), image_of_text


class ImageDataModule(TrainDataModule):
    """Images, decoded while the tower trains."""

    def __init__(self, experiment: Experiment):
        """Open the sources.

        Raises:
            UserError: data.train or data.val cannot be read.
        """
        super().__init__(experiment)
        self.train = open_source(experiment.data.train)
        self.val = open_source(experiment.data.val) if experiment.data.val is not None else None
        self.count = sum(1 for captions in self.train.captions() if len(captions) > 0)
        self._encoder: tuple[ImageEncoder, dict[str, Any]] | None = None

    @override
    def captions(self) -> Iterable[str]:
        return itertools.chain.from_iterable(self.train.captions())

    @override
    def image_encoder(self) -> tuple[ImageEncoder, dict[str, Any]]:
        """The whole tower with its pretrained weights, or with random ones in mode scratch."""
        if self._encoder is None:
            config = self._experiment.image_tower
            if self._experiment.mode == "scratch":
                config = replace(config, pretrained=False, weights=None)
            elif not config.pretrained and config.weights is None:
                raise UserError(
                    "mode is unlocked, but image_tower.pretrained is false and image_tower.weights is not set: set one "
                    "of them for the tower to start from, or set mode: scratch"
                )
            tower = ImageTower(config, trainable=True)
            encoder = ImageEncoder(tower, width=tower.embedding_width, head=config.head)
            start = tower.fingerprint()
            if self._experiment.mode == "scratch":
                start = start | {"weights": None}  # random: the seed identifies them
            # The loader's position in a checkpoint counts rows of this listing and of no other.
            identity = start | {"source": self.train.identity()}
            self._encoder = encoder, identity
        return self._encoder

    @override
    def train_dataloader(self) -> ImageLoader:
        """This rank's part of the global batches."""
        if self._loader is None:
            self._choose_shuffle(choose_image_shuffle(self.train, self._experiment.train.devices))
            self._loader = self._open_loader()
        return self._loader

    @override
    def teardown(self, stage: str) -> None:
        """End the worker processes and warn of unusable images, once."""
        if self._loader is None:
            return
        self._loader.close()
        skipped, self._loader.skipped = self._loader.skipped, Counter()
        if skipped and is_first_process():
            reasons = "; ".join(f"{count} {reason}" for reason, count in skipped.most_common(5))
            _logger.warning(
                f"{skipped.total():,} of {self._loader.seen:,} images (of this process) could not be used and were "
                f"replaced by others: {reasons}"
            )

    def val_sample(self) -> ValidationSample:
        """The first train.val_rows usable images of data.val."""
        assert self.val is not None
        count = self._experiment.train.val_rows
        pixels, captions = [], []
        for batch in pixel_batches(self._val_pixels(), self._workers(), pin_memory=False):
            if len(batch.samples) > 0:  # a unit outside data.val.fold has none
                pixels.append(batch.pixels.numpy())
                captions += [sample.captions for sample in batch.samples]
            if len(captions) >= count:
                break
        if not captions:
            raise UserError(
                f"{self.val.name} has no usable image with a caption to validate on; fix data.val, or leave it out"
            )
        captions = captions[:count]
        texts = list(itertools.chain.from_iterable(captions))
        image_of_text = np.repeat(np.arange(len(captions)), [len(texts_of_image) for texts_of_image in captions])
        return np.concatenate(pixels)[:count], self.tokenizer(texts), image_of_text

    def _open_loader(self) -> ImageLoader:
        tower, config = self._image_tower(), self._experiment.data
        decoder = Decoder(
            # After a random crop the image is squashed: cropping it again would cut off more.
            tower.transform(squash=config.random_crop is not None),
            image_size=tower.image_size,
            max_pixels=config.max_image_pixels,
            draft=tower.draft(),
            crop=config.random_crop,
            flip=config.random_flip,
        )
        return ImageLoader(
            self.train,
            self.tokenizer,
            decoder,
            workers=self._workers(),
            max_skipped=config.max_skipped,
            labels=self._experiment.loss.same == "label",
            corruption=corruption_of(config, self._experiment.seed, self.tokenizer),
            **self._loader_options(),
        )

    def _val_pixels(self) -> UnitPixels:
        assert self.val is not None
        tower = self._image_tower()
        size = self._experiment.cache.batch_size or 128  # only decoded together
        max_pixels = self._experiment.data.max_image_pixels
        return UnitPixels(self.val, self.val.units(size), tower.transform(), size, max_pixels, tower.draft())

    def _image_tower(self) -> ImageTower:
        tower = self.image_encoder()[0].tower
        assert tower is not None
        return tower

    def _workers(self) -> int:
        if self._experiment.data.workers is not None:
            return self._experiment.data.workers
        return machine.default_workers(self._experiment.train.devices)


def open_data(experiment: Experiment) -> CacheDataModule | ImageDataModule:
    """Open the caches in mode locked, the images in the other modes.

    Raises:
        UserError: a cache is missing or does not fit the experiment, or a source cannot be read.
    """
    return CacheDataModule(experiment) if experiment.mode == "locked" else ImageDataModule(experiment)
