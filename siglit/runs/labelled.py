"""Images with labels, for the evaluations by class: outputs of the image tower and labels of both splits.

Knows where each mode keeps its embeddings; computes nothing. Shapes: N images, D width of the image tower.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from siglit.cache import EmbeddingCache
from siglit.config import Experiment
from siglit.errors import UserError
from siglit.runs.caches import open_cache
from siglit.runs.trained import open_trained


@dataclass(frozen=True)
class Labelled:
    """The images of a split that have a label."""

    cache: EmbeddingCache
    """Outputs of the image tower, not normalized."""
    rows: np.ndarray
    """(N,) rows of the cache."""
    labels: np.ndarray
    """(N,) int64 label of each, 0 or more."""

    def embeddings(self) -> np.ndarray:
        """(N, D) float16 outputs of the image tower."""
        return self.cache.gather(self.rows)


@dataclass(frozen=True)
class LabelledSplits:
    """Labelled images of both splits, with the same classes."""

    train: Labelled
    val: Labelled
    classes: np.ndarray
    """(C,) labels of the training images, each once, ascending; those of `val` are among them."""
    origin: dict[str, Any]
    """What a result was computed from, for its JSON: checkpoint and step of a trained image tower, caches, digests."""

    def class_indices(self, part: Labelled) -> np.ndarray:
        """(N,) index of each image's label in `classes`."""
        return np.searchsorted(self.classes, part.labels)


def labels_of(cache: EmbeddingCache, split: str) -> np.ndarray:
    """(N,) int64 labels of a cache's rows, −1 for none.

    Raises:
        UserError: no row has a label.
    """
    if cache.labels is None or not (cache.labels >= 0).any():
        raise UserError(
            f"{cache.path} has no labels to evaluate with; set data.{split}.label_column, or use data with labels, "
            "and run `siglit precompute` into another folder (cache.path)"
        )
    return cache.labels


def class_folders_of(cache: EmbeddingCache) -> list[str] | None:
    """Names of the class folders that the images came from, label 0 first; None for other formats."""
    source = cache.fingerprint.get("source")
    return source.get("classes") if isinstance(source, dict) else None


def open_splits(experiment: Experiment) -> LabelledSplits:
    """Open the labelled images of both splits; a trained image tower embeds them first, if no cache has them.

    Raises:
        UserError: eval.split is not val, a split has no cache or no labels, the splits differ in image tower or class
            folders, a class has images in data.val alone, or data.train has a single class.
    """
    if experiment.eval.split != "val":
        raise UserError(
            f"eval.split is {experiment.eval.split}, but this evaluation trains a classifier on data.train and tests "
            "it on data.val; set eval.split to val"
        )
    (train, _), (val, origin) = _open(experiment, "train"), _open(experiment, "val")
    if train.cache.fingerprint["image_tower"] != val.cache.fingerprint["image_tower"]:
        raise UserError(
            f"{train.cache.path} and {val.cache.path} are of different image towers; run `siglit precompute` for both"
        )
    train_names, val_names = class_folders_of(train.cache), class_folders_of(val.cache)
    if train_names is not None and val_names is not None and train_names != val_names:
        in_one = sorted({*train_names} ^ {*val_names})
        raise UserError(
            "data.train and data.val have different class folders, so their labels mean different classes: "
            f"{in_one[0]!r} is in one of them only; make the folders the same"
        )
    classes = np.unique(train.labels)
    unseen = np.setdiff1d(val.labels, classes)
    if len(unseen) > 0:
        raise UserError(
            f"class {unseen[0]} has images in data.val but none in data.train ({len(unseen)} in all); both need the "
            "same classes"
        )
    if len(classes) < 2:
        raise UserError(
            f"all images of {train.cache.path} are of class {classes[0]}; a classifier needs two classes or more"
        )
    origin |= {"train_cache": str(train.cache.path), "train_cache_digest": train.cache.digest}
    return LabelledSplits(train, val, classes, origin)


def _open(experiment: Experiment, split: Literal["train", "val"]) -> tuple[Labelled, dict[str, Any]]:
    if experiment.mode == "locked":
        cache = open_cache(experiment, split)
        origin: dict[str, Any] = {"cache": str(cache.path), "cache_digest": cache.digest}
    else:
        trained = open_trained(experiment, split)
        cache, origin = trained.cache, trained.origin()
    labels = labels_of(cache, split)
    rows = np.flatnonzero(labels >= 0)
    return Labelled(cache, rows, labels[rows]), origin
