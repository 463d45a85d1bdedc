"""Linear probe: multinomial logistic regression on the outputs of an image tower, by L-BFGS on all images at once.

Arrays in, numbers out. Features are standardised by the training images' mean and standard deviation: outputs of towers
have any scale, and some features a hundred times that of others, where one penalty would mean as many things and
L-BFGS take long. Unit rows would drop the norm, which tells classes apart too. Shapes: N images, C classes, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from siglit.evaluation.classification import Classification, tally

L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Penalties that are tried, the strongest first, so that each fit starts near its end."""
_ITERATIONS = 1000
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Of the largest component of the gradient; scikit-learn's default is 1e-4."""
_LOGITS_AT_ONCE = 1 << 24
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Linear:
    """A linear map from standardised features to logits."""

    weight: torch.Tensor
    """(C, D)."""
    bias: torch.Tensor
    """(C,)."""
    gradient: float
    """Largest component of the objective's gradient here, 0 at the optimum."""


@dataclass(frozen=True)
class Probed:
    """A probe's choice of its penalty, and how well it classifies the test images."""

    l2: float
    held_out: dict[float, float]
    """{penalty: accuracy on the held-out tenth}."""
    gradient: float
    """As of `Linear`, of the probe that was fitted to all training images."""
    found: Classification
    """Of the test images."""


@dataclass(frozen=True)
class Standardiser:
    """Rows to features of mean 0 and standard deviation 1 over the training images."""

    mean: torch.Tensor
    """(D,)."""
    std: torch.Tensor
    """(D,), and 1e-5, as of `fewshot`."""

    def __call__(self, rows: np.ndarray) -> torch.Tensor:
        """Map (N, D) rows to (N, D) features, on the device and in the dtype of the mean."""
        found = torch.empty(rows.shape, dtype=self.mean.dtype, device=self.mean.device)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = torch.from_numpy(rows[start : start + _ROWS_AT_ONCE]).to(found)
            found[start : start + _ROWS_AT_ONCE] = (block - self.mean) / self.std
        return found


def standardiser(rows: np.ndarray, device: torch.device, dtype: torch.dtype = torch.float32) -> Standardiser:
    """Measure (N, D) rows, summed up in float64."""
    blocks = [rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE)]
    mean = sum(block.sum(0, dtype=np.float64) for block in blocks) / len(rows)
    variance = sum(np.square(block - mean).sum(0) for block in blocks) / len(rows)
    measured = (torch.as_tensor(value, dtype=dtype, device=device) for value in (mean, np.sqrt(variance) + 1e-5))
    return Standardiser(*measured)


def objective(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, l2: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross-entropy + l2 / 2 · sum of the squared weights, and its gradient; the bias is not penalised.

    scikit-learn's `LogisticRegression` has the same optimum at C = 1 / (l2 · N).

    Args:
        x: (N, D) features.
        y: (N,) int64 classes.
        weight: (C, D).
        bias: (C,).
        l2: penalty.

    Returns:
        () float64; (C, D) and (C,) gradients. Logits are held for a block of rows at a time.
    """
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    step = max(1, _LOGITS_AT_ONCE // len(bias))
    for start in range(0, len(x), step):
        block, right = x[start : start + step], y[start : start + step, None]
        log_p = F.log_softmax(torch.addmm(bias, block, weight.T), dim=1)
        total -= log_p.gather(1, right).sum(dtype=torch.float64)
        off = log_p.exp_().scatter_add_(1, right, torch.full_like(right, -1, dtype=log_p.dtype))
        of_weight += off.T @ block
        of_bias += off.sum(0)
    loss = total / len(x) + l2 / 2 * weight.square().sum(dtype=torch.float64)
    return loss, of_weight / len(x) + l2 * weight, of_bias / len(x)


def fit(
    x: torch.Tensor,
    y: torch.Tensor,
    classes: int,
    l2: float,
    *,
    start: Linear | None = None,
    told: Callable[[], None] = lambda: None,
) -> Linear:
    """Minimise `objective`.

    Args:
        x: (N, D) features.
        y: (N,) int64 classes.
        classes: C.
        l2: penalty.
        start: where to start; default: zeros.
        told: called after each pass over the images.
    """
    weight = start.weight.clone() if start else x.new_zeros(classes, x.shape[1])
    bias = start.bias.clone() if start else x.new_zeros(classes)
    tolerance = _TOLERANCE[x.dtype]
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        tolerance_grad=tolerance,
        # The loss is of the order of 1 and flat at its end; the gradient is to end the search, where it can.
        tolerance_change=1e-3 * tolerance**2,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        loss, weight.grad, bias.grad = objective(x, y, weight, bias, l2)
        told()
        return loss

    with torch.no_grad():
        optimiser.step(closure)
        _, *gradients = objective(x, y, weight, bias, l2)
    return Linear(weight, bias, max(float(g.abs().max()) for g in gradients))


def accuracies_by_l2(
    x: torch.Tensor,
    y: torch.Tensor,
    classes: int,
    held_out: int,
    grid: Sequence[float] = L2_GRID,
    told: Callable[[], None] = lambda: None,
) -> dict[float, float]:
    """Accuracy on the last `held_out` rows of fits to the others, {penalty: share}; the grid's order is kept."""
    fitted, known = x[:-held_out], y[:-held_out]
    model: Linear | None = None
    found: dict[float, float] = {}
    for l2 in grid:
        model = fit(fitted, known, classes, l2, start=model, told=told)
        logits = torch.addmm(model.bias, x[-held_out:], model.weight.T)
        found[l2] = float((logits.argmax(1) == y[-held_out:]).float().mean())
    return found


def probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    classes: int,
    *,
    device: torch.device,
    seed: int = 0,
    told: Callable[[], None] = lambda: None,
) -> Probed:
    """Choose the penalty on a tenth of the training images, fit to all of them, and classify the test images.

    Args:
        train: (N, D) float16 outputs of the tower, not normalised.
        train_labels: (N,) integers in [0, C).
        test: (M, D), as `train`.
        test_labels: (M,) integers in [0, C).
        classes: C.
        device: where to compute, in float32.
        seed: of the tenth that is held out; among penalties that do equally well there, the strongest is taken.
        told: called after each pass over the training images.
    """
    # The held-out tenth lies at the end, so that neither part has to be copied.
    order = np.random.default_rng(seed).permutation(len(train))
    standardise = standardiser(train, device)
    x, y = standardise(train[order]), torch.from_numpy(train_labels[order]).to(device)
    held_out = accuracies_by_l2(x, y, classes, max(1, len(train) // 10), told=told)
    l2 = max(held_out, key=lambda penalty: (held_out[penalty], penalty))
    model = fit(x, y, classes, l2, told=told)
    starts = range(0, len(test), _ROWS_AT_ONCE)

    def scores(rows: np.ndarray) -> np.ndarray:
        return torch.addmm(model.bias, standardise(rows), model.weight.T).cpu().numpy()

    found = tally(((scores(test[s : s + _ROWS_AT_ONCE]), test_labels[s : s + _ROWS_AT_ONCE]) for s in starts), classes)
    return Probed(l2, held_out, model.gradient, found)
