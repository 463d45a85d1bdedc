"""Few-shot classification by ridge regression onto the classes, in closed form.

Arrays in, numbers out. Computes in float64, where big_vision does in float32: the bias feature of 100 and the penalty
of 1024 leave the smallest eigenvalues little of a float32. Shapes: N images, n of them shots, C classes, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

L2 = 2.0**10
"""Penalty of the squared weights."""
_BIAS = 100.0
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Ridge:
    """A linear map from whitened features to classes."""

    mean: np.ndarray
    """(D,) float64, of the shots."""
    std: np.ndarray
    """(D,) float64, of the shots, plus 1e-5."""
    weights: np.ndarray
    """(D + 1, C) float64, the bias last."""

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Return the classes of (N, D) rows: (N,) integers in [0, C)."""
        blocks = (rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE))
        predicted = [(_features(block, self.mean, self.std) @ self.weights).argmax(1) for block in blocks]
        return np.concatenate(predicted)


def draw_shots(labels: np.ndarray, classes: np.ndarray, shots: Sequence[int], seed: int) -> dict[int, np.ndarray]:
    """Draw images of every class, without replacement.

    The images of each class are shuffled, class after class, by one generator; k shots are the first k of each class,
    so that more shots contain fewer. From the same images in the same order, big_vision draws the same.

    Args:
        labels: (N,) classes; images whose label is not in `classes` are left out.
        classes: (C,) ascending.
        shots: numbers of images per class to draw.
        seed: of numpy's default generator.

    Returns:
        {k: (C · k,) rows, class by class}.

    Raises:
        ValueError: a class has fewer images than the largest of `shots`.
    """
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[order], [classes, classes + 1])
    fewest = int((bounds[1] - bounds[0]).min())
    if fewest < max(shots):
        raise ValueError(f"cannot draw {max(shots)} images of every class: one class has {fewest}")
    draw = np.random.default_rng(seed)
    of_class = [draw.permutation(order[start:end]) for start, end in bounds.T]
    return {k: np.concatenate([rows[:k] for rows in of_class]) for k in shots}


def fit_ridge(rows: np.ndarray, labels: np.ndarray, classes: int, l2: float = L2) -> Ridge:
    """Regress targets of ±1 on whitened features and a constant feature of 100, which the penalty hardly reaches.

    Args:
        rows: (n, D) outputs of an image tower, not normalized.
        labels: (n,) integers in [0, C).
        classes: C.
        l2: penalty.

    Source: big_vision `evaluators/fewshot_lsr.py`, which takes the same solution from an eigendecomposition.
    """
    mean = rows.mean(0, dtype=np.float64)
    std = rows.std(0, dtype=np.float64) + 1e-5
    x = _features(rows, mean, std)
    targets = np.full((len(x), classes), -1.0)
    targets[np.arange(len(x)), labels] = 1.0
    count, width = x.shape
    if count >= width:
        weights = np.linalg.solve(x.T @ x + l2 * np.eye(width), x.T @ targets)
    else:
        weights = x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(count), targets)
    return Ridge(mean, std, weights)


def _features(rows: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    whitened = (rows - mean) / std
    return np.concatenate([whitened, np.full((len(rows), 1), _BIAS)], axis=1)
