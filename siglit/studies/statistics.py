"""Numbers over seeds: paired contrasts, their mean, spread and 95 % interval, and the verdicts that follow from them.

Knows nothing of studies, records or files: it is given numbers by seed. A verdict follows from the numbers alone.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

REPRODUCED, LEANS, NO_EFFECT, CONTRADICTED = "reproduced", "leans", "no effect", "contradicted"
"""Verdicts of an expectation, besides INCOMPLETE; REPRODUCED and CONTRADICTED are verdicts of a study, too."""
TREND_ONLY, NOT_AT_THIS_SIZE, INCOMPLETE = "trend only", "not at this size", "incomplete"

BySeed = Mapping[int, float]
"""{seed: value}"""
_CONFIDENCE = 0.95
_DECIMALS = 12
"""Contrasts are rounded to these: the sum of the same values in another order must not count as an effect."""


@dataclass(frozen=True)
class Estimate:
    """Mean of a contrast over seeds with the ends of its 95 % interval; NaN without seeds."""

    mean: float
    low: float
    high: float
    n: int
    """Seeds."""


def contrast(plus: Sequence[Sequence[BySeed]], minus: Sequence[Sequence[BySeed]]) -> dict[int, float]:
    """Sum of the terms of `plus` less the sum of those of `minus`, for each seed that all of their arms have.

    Args:
        plus: terms; each is a list of arms and stands for the arms' mean.
        minus: the same.
    """
    arms = [arm for term in (*plus, *minus) for arm in term]
    seeds = sorted(set.intersection(*(set(arm) for arm in arms))) if len(arms) > 0 else []

    def total(terms: Sequence[Sequence[BySeed]], seed: int) -> float:
        return math.fsum(statistics.fmean(arm[seed] for arm in term) for term in terms)

    return {seed: round(total(plus, seed) - total(minus, seed), _DECIMALS) for seed in seeds}


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    values = list(values)
    return statistics.fmean(values) if len(values) > 0 else math.nan


def sample_sd(values: Iterable[float]) -> float:
    """Sample standard deviation (n − 1); NaN of fewer than two values."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else math.nan


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and 95 % t-interval; of one value the interval is infinite, of equal values it is the value."""
    values = list(values)
    n, center = len(values), mean(values)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    half = t_quantile(n - 1) * sample_sd(values) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(center, center - half, center + half, n)


def t_quantile(degrees: int) -> float:
    """The t between whose negative and itself lie 95 % of Student's distribution with `degrees` of freedom.

    The share between −t and t has a closed form in the angle atan(t / √degrees); the angle is found by bisection.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(64):  # halves the angle's interval down to the resolution of a float
        angle = (low + high) / 2
        low, high = (angle, high) if _central_share(angle, degrees) < _CONFIDENCE else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def _central_share(angle: float, degrees: int) -> float:
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(odd + 2, degrees + 1, 2):  # (degrees - odd) / 2 terms
        total += term
        term *= square * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def verdict(found: Estimate, margin: float = 0.0) -> str:
    """Verdict of an expectation that the contrast is above the margin."""
    if found.n == 0:
        return INCOMPLETE
    if found.low > margin:
        return REPRODUCED
    if found.high < margin:
        return CONTRADICTED
    return LEANS if found.mean > margin else NO_EFFECT


def study_verdict(verdicts: Sequence[str], complete: bool) -> str:
    """Verdict of a study from those of its expectations.

    Args:
        verdicts: of the expectations.
        complete: whether every run is there and up to date.
    """
    if not complete or INCOMPLETE in verdicts or len(verdicts) == 0:
        return INCOMPLETE
    if all(word == REPRODUCED for word in verdicts):
        return REPRODUCED
    if CONTRADICTED in verdicts and REPRODUCED not in verdicts:
        return CONTRADICTED
    at_least_leaning = sum(word in (REPRODUCED, LEANS) for word in verdicts)
    return TREND_ONLY if 2 * at_least_leaning >= len(verdicts) else NOT_AT_THIS_SIZE
