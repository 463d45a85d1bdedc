"""From class scores to accuracies and a confusion matrix.

Arrays in, numbers out. Shapes: N images, C classes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Classification:
    """Accuracies and confusions of a classification."""

    images: int
    """N."""
    top: dict[int, float]
    """{k: share of images whose class is among the k best scores}; only for k < C, as k = C is always 1."""
    mean_per_class: float
    """Unweighted mean of `per_class` over the classes that have images."""
    per_class: np.ndarray
    """(C,) share of a class's images that are predicted as it; NaN for a class without images."""
    confusion: np.ndarray
    """(C, C) int64: number of images of class [row] that are predicted as class [column]."""


def tally(
    scored: Iterable[tuple[np.ndarray, np.ndarray]], classes: int, ks: Sequence[int] = (1, 5), tie: float = 0.0
) -> Classification:
    """Count how often the correct class is among the best scores.

    An image is correct at k if fewer than k other classes score as high as its own. Ties count against the model, so
    that a model that scores all classes alike has an accuracy of 0; so does a score that is NaN.

    Args:
        scored: blocks of (n, C) scores and (n,) labels in [0, C).
        classes: C.
        ks: cut-offs.
        tie: scores that differ by no more than this are tied.

    Raises:
        ValueError: there is no image, or fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"classification needs two classes or more, got {classes}")
    confusion = np.zeros((classes, classes), np.int64)
    correct = dict.fromkeys((k for k in ks if k < classes), 0)
    for scores, labels in scored:
        predicted, ranks = _predict_and_rank(scores, labels, tie)
        np.add.at(confusion, (labels, predicted), 1)
        for k in correct:
            correct[k] += int((ranks < k).sum())
    images, of_class = int(confusion.sum()), confusion.sum(1)
    if images == 0:
        raise ValueError("classification needs images with labels, got none")
    per_class = np.full(classes, np.nan)
    np.divide(confusion.diagonal(), of_class, out=per_class, where=of_class > 0)
    return Classification(
        images=images,
        top={k: count / images for k, count in correct.items()},
        mean_per_class=float(np.nanmean(per_class)),
        per_class=per_class,
        confusion=confusion,
    )


def _predict_and_rank(scores: np.ndarray, labels: np.ndarray, tie: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the (n,) predicted classes, and the (n,) numbers of other classes that score as high as an image's own."""
    rows = np.arange(len(labels))
    own = scores[rows, labels][:, None]
    # Not `>=`, which is False for NaN.
    ahead = ~(scores < own - tie)
    ahead[rows, labels] = False
    ranks = ahead.sum(1)
    others = scores.copy()
    others[rows, labels] = -np.inf
    return np.where(ranks == 0, labels, others.argmax(1)), ranks
