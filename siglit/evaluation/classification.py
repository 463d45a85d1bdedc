"""From scores of classes to accuracies and counts of confusions.

Arrays in, numbers out. Shapes: N images, C classes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Classification:
    """How well images were put into classes."""

    images: int
    """N."""
    top: dict[int, float]
    """{k: share of images whose class is among the first k}; only for k < C, as the first C are always all."""
    mean_per_class: float
    """Unweighted mean of `per_class` over the classes that have images."""
    per_class: np.ndarray
    """(C,) share of a class's images that were put into it; NaN for a class without images."""
    confusion: np.ndarray
    """(C, C) int64: images of class [row] that were put into class [column]."""


def tally(
    scored: Iterable[tuple[np.ndarray, np.ndarray]], classes: int, ks: Sequence[int] = (1, 5), tie: float = 0.0
) -> Classification:
    """Count how high the right classes score.

    An image is right at k if fewer than k wrong classes score as high as its own. Equal scores count against the model,
    so that one that scores all classes alike is right nowhere; so does a score that is not a number.

    Args:
        scored: blocks of (n, C) scores and (n,) labels in [0, C).
        classes: C.
        ks: cut-offs.
        tie: scores that differ by no more than this are equal.

    Raises:
        ValueError: there is no image, or fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"classification needs two classes or more, got {classes}")
    confusion = np.zeros((classes, classes), np.int64)
    right = dict.fromkeys((k for k in ks if k < classes), 0)
    for scores, labels in scored:
        taken, ranks = _judge(scores, labels, tie)
        np.add.at(confusion, (labels, taken), 1)
        for k in right:
            right[k] += int((ranks < k).sum())
    images, of_class = int(confusion.sum()), confusion.sum(1)
    if not images:
        raise ValueError("classification needs images with labels, got none")
    per_class = np.full(classes, np.nan)
    np.divide(confusion.diagonal(), of_class, out=per_class, where=of_class > 0)
    return Classification(
        images=images,
        top={k: count / images for k, count in right.items()},
        mean_per_class=float(np.nanmean(per_class)),
        per_class=per_class,
        confusion=confusion,
    )


def _judge(scores: np.ndarray, labels: np.ndarray, tie: float) -> tuple[np.ndarray, np.ndarray]:
    """(n,) class that each image is put into, and (n,) number of wrong classes that score as high as its own."""
    each = np.arange(len(labels))
    own = scores[each, labels][:, None]
    # Not `>=`: what is not a number compares with nothing.
    ahead = ~(scores < own - tie)
    ahead[each, labels] = False
    ranks = ahead.sum(1)
    wrong = scores.copy()
    wrong[each, labels] = -np.inf
    return np.where(ranks == 0, labels, wrong.argmax(1)), ranks
