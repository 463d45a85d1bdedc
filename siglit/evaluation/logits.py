"""Logits t · x·y + b of held-out pairs: how they are distributed, and whether σ(logit) is calibrated.

Arrays in, numbers out; knows nothing of caches or towers. Every pair is looked at, in blocks: logits are counted in
fine bins over all values that a logit can take, and everything reported is computed from those counts, so that memory
does not grow with the number of pairs.
Shapes: N images, M texts, G distinct texts, D embedding width, F fine bins.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from siglit.runtime.progress import Meter

_FINE = 1 << 14
_BARS = 120
_RELIABILITY_BINS = 20
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs whose logits lie in one interval."""

    low: float
    high: float
    """Ends of the interval."""
    predicted: float
    """Weighted mean of σ(logit)."""
    observed: float
    """Weighted share of positives."""
    weight: float
    """Weight of its pairs; a positive weighs 1."""


@dataclass(frozen=True)
class LogitHealth:
    """Logits of positives and negatives on common edges, and the calibration of σ(logit)."""

    edges: list[float]
    """Edges of the histogram's bins, from the lowest to the highest logit that occurs."""
    positive: list[int]
    """Positives in each bin."""
    negative: list[int]
    """Negatives in each bin."""
    positive_mean: float
    negative_mean: float | None
    """None if there is no negative."""
    positive_quantiles: dict[str, float]
    """{"0.5": the median, …}, exact to the width of a fine bin."""
    negative_quantiles: dict[str, float]
    prior: float
    """Weighted share of positives: what σ(logit) averages to if calibrated."""
    ece: float
    """Expected calibration error: weighted mean of |predicted − observed| over the bins of `calibration`."""
    calibration: list[ReliabilityBin] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return all fields, with "from" and "to" for the ends of a bin."""
        value = asdict(self)
        value["positives"], value["negatives"] = sum(self.positive), sum(self.negative)
        value["calibration"] = [
            {"from": b.low, "to": b.high, "predicted": b.predicted, "observed": b.observed, "weight": b.weight}
            for b in self.calibration
        ]
        return value


def logit_health(
    zimg: np.ndarray,
    ztxt: np.ndarray,
    image_of_text: np.ndarray,
    t: float,
    b: float,
    *,
    batch_size: int,
    text_ids: np.ndarray | None = None,
    block_size: int = 1024,
    device: torch.device | None = None,
    quiet: bool = False,
) -> LogitHealth:
    """Compute histogram and calibration of the logits of all pairs.

    A text's own image is a positive. Any other image is a negative, unless one of its captions is the same text: such
    a pair is left out.

    Calibration needs a prior. σ(logit) is trained to be the probability that a pair of a batch belongs together, where
    each text meets its own image and B − 1 others. So each positive weighs 1 and each negative (B − 1) / (N − 1), the
    chance that its image is in a batch with its text; B is `batch_size`, or N where there are fewer images. Bins are
    intervals of the logit with about equally many positives in each: nearly all negatives have probabilities near
    0, where bins of equal width would show nothing.

    Args:
        zimg: (N, D) unit rows; logits are computed in their dtype.
        ztxt: (M, D) unit rows.
        image_of_text: (M,) integers, the row of `zimg` that each text describes.
        t: logit scale, more than 0.
        b: logit bias.
        batch_size: global batch of the training.
        text_ids: (M,) integers, equal for equal texts, whose rows must be equal too; default: all texts differ.
        block_size: texts and images per block.
        device: where to compute; default: the CPU.
        quiet: show no progress.

    Raises:
        ValueError: there are no images or no texts, the lengths of the arrays differ, an index is out of range, t is
            not positive, or a value is not finite.

    Source: expected calibration error as in Guo et al., arXiv:1706.04599, eq. 3, with bins of equal mass (of the
        positives) as in Nguyen and O'Connor, arXiv:1508.05154.
    """
    image_of_text = np.asarray(image_of_text, dtype=np.int64)
    ids = np.arange(len(ztxt)) if text_ids is None else np.asarray(text_ids)
    _check(zimg, ztxt, image_of_text, ids, t, b)
    _, first, group, repeats = np.unique(ids, return_index=True, return_inverse=True, return_counts=True)
    reach = t * _largest_norm(zimg) * _largest_norm(ztxt) * (1 + 1e-5)
    if not math.isfinite(reach):
        raise ValueError("embeddings contain values that are not finite")
    device = device or torch.device("cpu")
    positives, negatives = (_Histogram(b - reach, b + reach, device) for _ in range(2))
    block = block_size * block_size // max(1, zimg.shape[1])
    for start in range(0, len(ztxt), max(1, block)):
        texts = slice(start, start + max(1, block))
        products = (_rows(zimg[image_of_text[texts]], device) * _rows(ztxt[texts], device)).sum(1)
        positives.add(t * products + b, torch.ones(len(products), dtype=torch.float64, device=device))
    own = np.unique(np.stack([group.reshape(-1), image_of_text], axis=1), axis=0)
    with Meter("logits", len(first), "distinct captions", quiet=quiet) as meter:
        for start in range(0, len(first), block_size):
            texts = slice(start, start + block_size)
            left_out = own[slice(*np.searchsorted(own[:, 0], (start, start + block_size)))] - (start, 0)
            _add_negatives(negatives, zimg, ztxt[first[texts]], repeats[texts], left_out, (t, b), block_size, device)
            meter.advance(len(first[texts]))
    share = (min(batch_size, len(zimg)) - 1) / max(1, len(zimg) - 1)
    return _health(positives, negatives, share)


def nearest_rows(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k nearest other rows of some of (G, D) unit rows.

    Args:
        queries: (Q,) indices of rows.
        rows: (G, D) unit rows.
        k: how many; G − 1 if that is fewer.

    Returns:
        (Q, k) cosines, best first; (Q, k) indices of the rows.
    """
    every = torch.from_numpy(rows)
    own = torch.as_tensor(queries, dtype=torch.int64)
    cosines = every[own] @ every.T
    cosines[torch.arange(len(own)), own] = -torch.inf
    best = cosines.topk(min(k, len(rows) - 1), dim=1)
    return best.values.numpy(), best.indices.numpy()


class _Histogram:
    """Weighted counts of logits in F bins between two bounds, and the sum of σ(logit) in each bin."""

    def __init__(self, low: float, high: float, device: torch.device):
        self.edges = np.linspace(low, high, _FINE + 1)
        self._low, self._per_unit = low, _FINE / (high - low)
        self._count = torch.zeros(_FINE, dtype=torch.float64, device=device)
        self._sigma = torch.zeros_like(self._count)
        self._sum = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, logits: torch.Tensor, weights: torch.Tensor) -> None:
        """Count (P,) logits, each with its float64 weight."""
        wide = logits.double()
        place = ((wide - self._low) * self._per_unit).long().clamp_(0, _FINE - 1)
        self._count += torch.bincount(place, weights, minlength=_FINE)
        self._sigma += torch.bincount(place, weights * wide.sigmoid(), minlength=_FINE)
        self._sum += weights @ wide

    @property
    def count(self) -> np.ndarray:
        """(F,) weights."""
        return self._count.cpu().numpy()

    @property
    def sigma(self) -> np.ndarray:
        """(F,) weighted sums of σ(logit)."""
        return self._sigma.cpu().numpy()

    @property
    def mean(self) -> float | None:
        """Mean logit; None if no logit was counted."""
        total = self._count.sum().item()
        return self._sum.item() / total if total != 0 else None

    def quantiles(self) -> dict[str, float]:
        """Return quantiles by linear interpolation within a bin; empty without logits."""
        cumulated = np.concatenate([[0.0], self.count.cumsum()])
        if cumulated[-1] == 0:
            return {}
        last = np.searchsorted(cumulated, cumulated[-1])  # interpolation needs an increase at its upper end
        values = np.interp(np.multiply(_QUANTILES, cumulated[-1]), cumulated[: last + 1], self.edges[: last + 1])
        return {f"{q:g}": float(value) for q, value in zip(_QUANTILES, values, strict=True)}


def _check(zimg: np.ndarray, ztxt: np.ndarray, image_of_text: np.ndarray, ids: np.ndarray, t: float, b: float) -> None:
    if len(zimg) == 0 or len(ztxt) == 0:
        raise ValueError(f"logits need images and texts, got {len(zimg)} images and {len(ztxt)} texts")
    if not len(ztxt) == len(image_of_text) == len(ids):
        raise ValueError("image_of_text and text_ids must have an entry for every row of ztxt")
    if image_of_text.min() < 0 or image_of_text.max() >= len(zimg):
        raise ValueError(f"image_of_text must be rows of zimg, 0 to {len(zimg) - 1}")
    if not (0 < t < math.inf and math.isfinite(b)):
        raise ValueError(f"t must be finite and more than 0, and b finite, got t = {t} and b = {b}")


def _rows(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows)).to(device)


def _largest_norm(rows: np.ndarray) -> float:
    """Return the largest norm, without a squared copy of all rows; NaN if a value is NaN."""
    return math.sqrt(float(np.einsum("nd,nd->n", rows, rows, dtype=np.float64).max()))


def _add_negatives(
    histogram: _Histogram,
    zimg: np.ndarray,
    ztxt: np.ndarray,
    repeats: np.ndarray,
    left_out: np.ndarray,
    scale_and_bias: tuple[float, float],
    block_size: int,
    device: torch.device,
) -> None:
    """Count the pairs of (T, D) distinct texts with all images.

    Args:
        histogram: receives the logits.
        zimg: (N, D) rows.
        ztxt: (T, D) rows.
        repeats: (T,) how often each text occurs.
        left_out: (P, 2) texts and images, by index, of pairs that are not negatives.
        scale_and_bias: t and b.
        block_size: images at once.
        device: where to compute.
    """
    t, b = scale_and_bias
    texts, counts = _rows(ztxt, device), _rows(repeats.astype(np.float64), device)
    for start in range(0, len(zimg), block_size):
        images = _rows(zimg[start : start + block_size], device)
        weights = counts[:, None].repeat(1, len(images))
        here = left_out[(left_out[:, 1] >= start) & (left_out[:, 1] < start + block_size)]
        weights[_rows(here[:, 0], device), _rows(here[:, 1] - start, device)] = 0
        histogram.add((t * (texts @ images.T) + b).flatten(), weights.flatten())


def _health(positives: _Histogram, negatives: _Histogram, share: float) -> LogitHealth:
    """Combine both histograms; each negative weighs `share`."""
    occupied = np.flatnonzero(positives.count + negatives.count)
    low, high = int(occupied[0]), int(occupied[-1]) + 1
    wide = -(-(high - low) // _BARS)
    bars = -(-(high - low) // wide)
    width = (positives.edges[-1] - positives.edges[0]) / _FINE
    edges = positives.edges[0] + width * (low + wide * np.arange(bars + 1))
    calibration = _calibration(positives, negatives, share)
    weight = sum(b.weight for b in calibration)
    assert positives.mean is not None
    return LogitHealth(
        edges=edges.tolist(),
        positive=_bars(positives.count, low, wide, bars),
        negative=_bars(negatives.count, low, wide, bars),
        positive_mean=positives.mean,
        negative_mean=negatives.mean,
        positive_quantiles=positives.quantiles(),
        negative_quantiles=negatives.quantiles(),
        prior=float(positives.count.sum() / (positives.count.sum() + share * negatives.count.sum())),
        ece=sum(b.weight * abs(b.predicted - b.observed) for b in calibration) / weight,
        calibration=calibration,
    )


def _bars(counts: np.ndarray, low: int, wide: int, bars: int) -> list[int]:
    """Sum `wide` fine bins at a time, starting at bin `low`."""
    shown = counts[low : low + wide * bars]
    return np.pad(shown, (0, wide * bars - len(shown))).reshape(bars, wide).sum(1).astype(np.int64).tolist()


def _calibration(positives: _Histogram, negatives: _Histogram, share: float) -> list[ReliabilityBin]:
    """Merge fine bins into reliability bins with a twentieth of the positives each."""
    occupied = np.flatnonzero(positives.count + negatives.count)
    cumulated = positives.count.cumsum()
    full = cumulated[-1] * np.arange(1, _RELIABILITY_BINS) / _RELIABILITY_BINS
    cuts = np.searchsorted(cumulated, full) + 1
    starts = np.unique(np.concatenate([occupied[:1], cuts[cuts <= occupied[-1]]]))
    ends = np.append(starts[1:], occupied[-1] + 1)
    bins = []
    for start, end in zip(starts, ends, strict=True):
        positive, negative = positives.count[start:end].sum(), share * negatives.count[start:end].sum()
        if positive + negative > 0:
            predicted = positives.sigma[start:end].sum() + share * negatives.sigma[start:end].sum()
            bins.append(
                ReliabilityBin(
                    low=float(positives.edges[start]),
                    high=float(positives.edges[end]),
                    predicted=float(predicted / (positive + negative)),
                    observed=float(positive / (positive + negative)),
                    weight=float(positive + negative),
                )
            )
    return bins
