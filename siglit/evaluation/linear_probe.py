"""Linear probe: multinomial logistic regression on the outputs of an image tower, by L-BFGS on all images at once.

Arrays in, numbers out. Features are standardized by the training images' mean and standard deviation. Outputs of towers
have any scale, and some features a hundred times that of others: without this, one penalty would act differently on
each, and L-BFGS would converge slowly. Normalizing rows instead would drop their norm, which also separates classes.
Shapes: N images, C classes, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from siglit.evaluation.classification import Classification, tally

L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Penalties that are tried, the strongest first, so that each fit starts near its solution."""
_ITERATIONS = 1000
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Of the largest component of the gradient; scikit-learn's default is 1e-4."""
_LOGITS_AT_ONCE = 1 << 24
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class LinearProbe:
    """A linear map from standardized features to logits."""

    weight: torch.Tensor
    """(C, D)."""
    bias: torch.Tensor
    """(C,)."""
    gradient: float
    """Largest component of the objective's gradient here, 0 at the optimum."""


@dataclass(frozen=True)
class ProbeFit:
    """The penalty that was chosen, and how well the probe classifies the test images."""

    l2: float
    held_out: dict[float, float]
    """{penalty: accuracy on the held-out tenth}."""
    gradient: float
    """As in `LinearProbe`, of the probe fitted to all training images."""
    test: Classification
    """Of the test images."""


@dataclass(frozen=True)
class Standardizer:
    """Maps rows to features of mean 0 and standard deviation 1 over the training images."""

    mean: torch.Tensor
    """(D,)."""
    std: torch.Tensor
    """(D,), plus 1e-5, as in `fewshot`."""

    def __call__(self, rows: np.ndarray) -> torch.Tensor:
        """Map (N, D) rows to (N, D) features, on the device and in the dtype of the mean."""
        features = torch.empty(rows.shape, dtype=self.mean.dtype, device=self.mean.device)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = torch.from_numpy(rows[start : start + _ROWS_AT_ONCE]).to(features)
            features[start : start + _ROWS_AT_ONCE] = (block - self.mean) / self.std
        return features


def fit_standardizer(rows: np.ndarray, device: torch.device, dtype: torch.dtype = torch.float32) -> Standardizer:
    """Compute mean and standard deviation of (N, D) rows, summed in float64."""
    blocks = [rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE)]
    mean = sum(block.sum(0, dtype=np.float64) for block in blocks) / len(rows)
    variance = sum(np.square(block - mean).sum(0) for block in blocks) / len(rows)
    measured = (torch.as_tensor(value, dtype=dtype, device=device) for value in (mean, np.sqrt(variance) + 1e-5))
    return Standardizer(*measured)


def objective(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, l2: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross-entropy + l2 / 2 · sum of the squared weights, and its gradient; the bias is not penalized.

    scikit-learn's `LogisticRegression` has the same optimum at C = 1 / (l2 · N).

    Args:
        x: (N, D) features.
        y: (N,) int64 classes.
        weight: (C, D).
        bias: (C,).
        l2: penalty.

    Returns:
        () float64 value; (C, D) and (C,) gradients. Logits are computed for a block of rows at a time.
    """
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    step = max(1, _LOGITS_AT_ONCE // len(bias))
    for start in range(0, len(x), step):
        block, labels = x[start : start + step], y[start : start + step, None]
        log_p = F.log_softmax(torch.addmm(bias, block, weight.T), dim=1)
        total -= log_p.gather(1, labels).sum(dtype=torch.float64)
        grad_logits = log_p.exp_().scatter_add_(1, labels, torch.full_like(labels, -1, dtype=log_p.dtype))
        grad_weight += grad_logits.T @ block
        grad_bias += grad_logits.sum(0)
    loss = total / len(x) + l2 / 2 * weight.square().sum(dtype=torch.float64)
    return loss, grad_weight / len(x) + l2 * weight, grad_bias / len(x)


def fit(
    x: torch.Tensor,
    y: torch.Tensor,
    classes: int,
    l2: float,
    *,
    start: LinearProbe | None = None,
    on_pass: Callable[[], None] = lambda: None,
) -> LinearProbe:
    """Minimize `objective`.

    Args:
        x: (N, D) features.
        y: (N,) int64 classes.
        classes: C.
        l2: penalty.
        start: where to start; default: zeros.
        on_pass: called after each pass over the images.
    """
    weight = start.weight.clone() if start is not None else x.new_zeros(classes, x.shape[1])
    bias = start.bias.clone() if start is not None else x.new_zeros(classes)
    tolerance = _TOLERANCE[x.dtype]
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        tolerance_grad=tolerance,
        # The loss is about 1 and flat near its minimum: the gradient should end the search, wherever possible.
        tolerance_change=1e-3 * tolerance**2,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        loss, weight.grad, bias.grad = objective(x, y, weight, bias, l2)
        on_pass()
        return loss

    with torch.no_grad():
        optimizer.step(closure)
        _, *gradients = objective(x, y, weight, bias, l2)
    return LinearProbe(weight, bias, max(float(g.abs().max()) for g in gradients))


def accuracies_by_l2(
    x: torch.Tensor,
    y: torch.Tensor,
    classes: int,
    held_out: int,
    grid: Sequence[float] = L2_GRID,
    on_pass: Callable[[], None] = lambda: None,
) -> dict[float, float]:
    """Return {penalty: accuracy on the last `held_out` rows} of fits to the other rows, in the order of the grid."""
    train, train_labels = x[:-held_out], y[:-held_out]
    model: LinearProbe | None = None
    accuracies: dict[float, float] = {}
    for l2 in grid:
        model = fit(train, train_labels, classes, l2, start=model, on_pass=on_pass)
        logits = torch.addmm(model.bias, x[-held_out:], model.weight.T)
        accuracies[l2] = float((logits.argmax(1) == y[-held_out:]).float().mean())
    return accuracies


def probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    classes: int,
    *,
    device: torch.device,
    seed: int = 0,
    on_pass: Callable[[], None] = lambda: None,
) -> ProbeFit:
    """Choose the penalty on a tenth of the training images, fit to all of them, and classify the test images.

    Args:
        train: (N, D) float16 outputs of the tower, not normalized.
        train_labels: (N,) integers in [0, C).
        test: (M, D), as `train`.
        test_labels: (M,) integers in [0, C).
        classes: C.
        device: where to compute, in float32.
        seed: of the choice of the held-out tenth; among penalties with equal accuracy there, the strongest is chosen.
        on_pass: called after each pass over the training images.
    """
    # The held-out tenth is at the end, so that neither part has to be copied.
    order = np.random.default_rng(seed).permutation(len(train))
    standardize = fit_standardizer(train, device)
    x, y = standardize(train[order]), torch.from_numpy(train_labels[order]).to(device)
    held_out = accuracies_by_l2(x, y, classes, max(1, len(train) // 10), on_pass=on_pass)
    l2 = max(held_out, key=lambda penalty: (held_out[penalty], penalty))
    model = fit(x, y, classes, l2, on_pass=on_pass)
    starts = range(0, len(test), _ROWS_AT_ONCE)

    def scores(rows: np.ndarray) -> np.ndarray:
        return torch.addmm(model.bias, standardize(rows), model.weight.T).cpu().numpy()

    blocks = ((scores(test[s : s + _ROWS_AT_ONCE]), test_labels[s : s + _ROWS_AT_ONCE]) for s in starts)
    return ProbeFit(l2, held_out, model.gradient, tally(blocks, classes))
