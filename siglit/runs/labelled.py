"""Images with classes, as the evaluations by class take them: tower outputs and labels of one split or of both.

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
    """The images of a split that have a class."""

    cache: EmbeddingCache
    """Outputs of the image tower, not normalised."""
    rows: np.ndarray
    """(N,) rows of the cache."""
    labels: np.ndarray
    """(N,) int64 class of each, in [0, …)."""

    def embeddings(self) -> np.ndarray:
        """(N, D) float16."""
        return self.cache.gather(self.rows)


@dataclass(frozen=True)
class LabelledSplits:
    """Training and held-out images of the same classes."""

    train: Labelled
    val: Labelled
    classes: np.ndarray
    """(C,) classes of the training images, ascending; those of `val` are among them."""
    of: dict[str, Any]
    """What a result belongs to, for its JSON: checkpoint and step of a trained image tower, caches and digests."""

    def numbered(self, part: Labelled) -> np.ndarray:
        """(N,) place of each image's class in `classes`."""
        return np.searchsorted(self.classes, part.labels)


def labels_of(cache: EmbeddingCache, split: str) -> np.ndarray:
    """(N,) int64 labels of a cache's rows, −1 for none.

    Raises:
        UserError: no row has one.
    """
    if cache.labels is None or not (cache.labels >= 0).any():
        raise UserError(
            f"{cache.path} has no labels to evaluate with; set data.{split}.label_column, or take a set that has "
            "labels, and embed it into another folder (cache.path)"
        )
    return cache.labels


def class_folders_of(cache: EmbeddingCache) -> list[str] | None:
    """Names of the class folders that the images came from, label 0 first; None where they did not."""
    source = cache.fingerprint.get("source")
    return source.get("classes") if isinstance(source, dict) else None


def open_splits(experiment: Experiment) -> LabelledSplits:
    """Open the images of both splits; a locked tower's need no checkpoint, a trained one embeds them first.

    Raises:
        UserError: a split has no cache or no labels, a class of the held-out images has no training image, …
    """
    if experiment.eval.split != "val":
        raise UserError(
            f"eval.split is {experiment.eval.split}, but this evaluation learns from data.train and is tested on "
            "data.val; set it to val"
        )
    (train, _), (val, of) = _open(experiment, "train"), _open(experiment, "val")
    here, there = train.cache, val.cache
    if here.fingerprint["image_tower"] != there.fingerprint["image_tower"]:
        raise UserError(f"{here.path} and {there.path} are of different image towers; run `siglit precompute` for both")
    names = class_folders_of(here), class_folders_of(there)
    if None not in names and names[0] != names[1]:
        odd = sorted({*(names[0] or ())} ^ {*(names[1] or ())})
        raise UserError(
            f"data.train and data.val have different class folders, so their labels mean different classes: {odd[0]!r} "
            f"is in one alone; make them the same"
        )
    classes = np.unique(train.labels)
    unseen = np.setdiff1d(val.labels, classes)
    if len(unseen):
        raise UserError(
            f"class {unseen[0]} has images in data.val but none in data.train ({len(unseen)} such classes); both need "
            "the same classes"
        )
    if len(classes) < 2:
        raise UserError(f"all images of {here.path} are of class {classes[0]}; a classifier needs two classes or more")
    return LabelledSplits(train, val, classes, of | {"train_cache": str(here.path), "train_cache_digest": here.digest})


def _open(experiment: Experiment, split: Literal["train", "val"]) -> tuple[Labelled, dict[str, Any]]:
    if experiment.mode == "locked":
        cache = open_cache(experiment, split)
        of: dict[str, Any] = {"cache": str(cache.path), "cache_digest": cache.digest}
    else:
        trained = open_trained(experiment, split)
        cache, of = trained.cache, trained.origin()
    labels = labels_of(cache, split)
    rows = np.flatnonzero(labels >= 0)
    return Labelled(cache, rows, labels[rows]), of
