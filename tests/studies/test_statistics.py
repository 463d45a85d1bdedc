"""Intervals against scipy and mpmath, contrasts over seeds, and every verdict once."""

import math

import mpmath
import pytest

from siglit.studies import statistics
from siglit.studies.statistics import Estimate


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30, 101])
def test_95_percent_of_t_lies_between_the_quantiles(degrees):
    """By mpmath's incomplete beta function, which PyTorch brings (through sympy)."""
    t = statistics.t_quantile(degrees)
    outside = mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True)
    assert float(outside) == pytest.approx(0.05, rel=1e-12)


@pytest.mark.parametrize(
    ("plus", "minus", "low", "high"),
    [
        ([0.31, 0.335], [0.292, 0.31], -0.02297171657661145, 0.0659717165766115),
        ([0.31, 0.335, 0.298, 0.32, 0.307], [0.292, 0.31, 0.301, 0.299, 0.3], -0.0006006414138286, 0.02780064141382865),
        (
            [0.31, 0.335, 0.298, 0.32, 0.307, 0.3],
            [0.292, 0.31, 0.301, 0.299, 0.3, 0.36],
            -0.03197639971116304,
            0.03464306637782973,
        ),
    ],
)
def test_interval_is_that_of_the_paired_t_test(plus, minus, low, high):
    """Expected: scipy 1.17.1, stats.ttest_rel(plus, minus).confidence_interval(0.95)."""
    found = statistics.estimate(statistics.contrast([[dict(enumerate(plus))]], [[dict(enumerate(minus))]]).values())
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-11)
    assert found.mean == pytest.approx((low + high) / 2, abs=1e-11)
    assert found.n == len(plus)


def test_a_contrast_pairs_seeds_and_averages_the_arms_of_a_term():
    plus = [[{0: 4.0, 1: 6.0}, {0: 2.0, 1: 2.0}], [{0: 1.0, 1: 1.0, 2: 9.0}]]
    minus = [[{1: 2.0, 0: 3.0}]]
    assert statistics.contrast(plus, minus) == {0: 3 + 1 - 3, 1: 4 + 1 - 2}


def test_rounding_is_no_effect():
    """0.1 + 0.2 is 0.3 and 6e-17: with zero spread, that alone would reproduce a finding."""
    values = statistics.contrast([[{0: 0.1, 1: 0.1}], [{0: 0.2, 1: 0.2}]], [[{0: 0.3, 1: 0.3}]])
    assert statistics.verdict(statistics.estimate(values.values())) == "no effect"


def test_spread_needs_two_values():
    assert math.isnan(statistics.sample_sd([1.0]))
    assert statistics.sample_sd([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert math.isnan(statistics.mean([]))


@pytest.mark.parametrize(
    ("values", "margin", "word"),
    [
        ([0.02, 0.03, 0.025], 0.0, "reproduced"),
        ([0.02, 0.03, 0.025], 0.02, "leans"),
        ([0.02, -0.01, 0.03], 0.0, "leans"),
        ([-0.02, 0.01, -0.03], 0.0, "no effect"),
        ([0.0, 0.0, 0.0], 0.0, "no effect"),
        ([-0.02, -0.03, -0.025], 0.0, "contradicted"),
        ([0.02, 0.02], 0.01, "reproduced"),  # zero spread: the interval is the point
        ([0.02, 0.02], 0.03, "contradicted"),
        ([0.9], 0.0, "leans"),  # one seed has no interval
        ([-0.9], 0.0, "no effect"),
        ([], 0.0, "incomplete"),
    ],
)
def test_verdict_of_an_expectation(values, margin, word):
    assert statistics.verdict(statistics.estimate(values), margin) == word


def test_an_interval_that_touches_the_margin_decides_nothing():
    assert statistics.verdict(Estimate(0.2, 0.1, 0.3, 5), 0.1) == "leans"
    assert statistics.verdict(Estimate(0.0, -0.1, 0.1, 5), 0.1) == "no effect"


@pytest.mark.parametrize(
    ("words", "complete", "word"),
    [
        (["reproduced", "reproduced"], True, "reproduced"),
        (["reproduced", "leans", "contradicted"], True, "trend only"),
        (["leans", "no effect"], True, "trend only"),
        (["leans", "contradicted"], True, "contradicted"),
        (["leans", "no effect", "no effect"], True, "not at this size"),
        (["reproduced", "contradicted", "contradicted"], True, "not at this size"),
        (["reproduced"], False, "incomplete"),
        (["reproduced", "incomplete"], True, "incomplete"),
        ([], True, "incomplete"),
    ],
)
def test_verdict_of_a_study(words, complete, word):
    assert statistics.study_verdict(words, complete) == word
