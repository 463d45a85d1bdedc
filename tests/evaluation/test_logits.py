"""Histogram and calibration of logits equal plain N × M computations, in memory that does not grow with the pairs."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from siglit.evaluation.logits import logit_health, nearest_rows

T, B = 12.0, -6.0


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def random_set(images=40, texts=91, dim=8, seed=0):
    """Unit rows in float64, texts near their images, a few texts of which are the same."""
    rng = np.random.default_rng(seed)
    zimg = unit(rng.standard_normal((images, dim)))
    image_of_text = rng.integers(0, images, texts)
    text_ids = np.arange(texts)
    text_ids[5], text_ids[texts - 1] = 2, 2
    ztxt = unit(zimg[image_of_text] + 0.8 * rng.standard_normal((texts, dim)))
    return zimg, ztxt[text_ids], image_of_text, text_ids


def plain(zimg, ztxt, image_of_text, text_ids):
    """All logits as a matrix, with masks of positives and negatives."""
    logits = T * ztxt @ zimg.T + B
    positive = image_of_text[:, None] == np.arange(len(zimg))
    negative = np.ones_like(positive)
    for text, image in zip(text_ids, image_of_text, strict=True):
        negative[text_ids == text, image] = False
    return logits, positive, negative


def health(data, batch_size=10**9, **options):
    zimg, ztxt, image_of_text, text_ids = data
    return logit_health(
        zimg, ztxt, image_of_text, T, B, text_ids=text_ids, batch_size=batch_size, quiet=True, **options
    )


def test_the_histogram_is_that_of_the_whole_matrix():
    data = random_set()
    actual, (logits, positive, negative) = health(data), plain(*data)
    assert (actual.positive, actual.negative) == tuple(
        np.histogram(logits[kind], actual.edges)[0].tolist() for kind in (positive, negative)
    )
    assert sum(actual.positive) == 91
    assert sum(actual.negative) == negative.sum() < 91 * 39
    assert actual.edges[0] <= logits.min() < logits.max() <= actual.edges[-1]
    assert 60 < len(actual.positive) <= 120, "the bins cover the logits that occur, not all possible ones"
    assert actual.positive_mean == pytest.approx(logits[positive].mean())
    assert actual.negative_mean == pytest.approx(logits[negative].mean())
    for kind, quantiles in ((positive, actual.positive_quantiles), (negative, actual.negative_quantiles)):
        assert list(quantiles) == ["0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99"]
        for q, value in quantiles.items():
            assert value == pytest.approx(np.quantile(logits[kind], float(q), method="inverted_cdf"), abs=0.01)


@pytest.mark.parametrize("batch_size", [16, 10**9])
def test_calibration_is_that_of_the_whole_matrix(batch_size):
    """Bins hold a twentieth of the positives each; a negative weighs what its chance to be in the batch is."""
    data = random_set(images=60, texts=400)
    actual, (logits, positive, negative) = health(data, batch_size), plain(*data)
    share = (min(batch_size, 60) - 1) / 59
    error = total = 0.0
    for b in actual.calibration:
        inside = (logits >= b.low) & (logits < b.high)
        weights = positive * 1.0 + share * negative
        probability = 1 / (1 + np.exp(-logits))
        weight = weights[inside].sum()
        assert (positive & inside).sum() == pytest.approx(20, abs=4)
        assert b.weight == pytest.approx(weight)
        assert b.predicted == pytest.approx((weights * probability)[inside].sum() / weight)
        assert b.observed == pytest.approx((positive & inside).sum() / weight)
        error, total = error + weight * abs(b.predicted - b.observed), total + weight
    assert len(actual.calibration) == 20
    assert total == pytest.approx(positive.sum() + share * negative.sum()), "no pair is left out"
    assert actual.ece == pytest.approx(error / total)
    assert actual.prior == pytest.approx(positive.sum() / total)


def calibrated_set(images=1500, dim=64, mean=0.5, seed=0):
    """Pairs whose log odds are linear in the cosine: with this t and b, σ(logit) is the posterior itself.

    Cosines of negatives are about N(0, 1/D), those of positives are drawn from N(mean, 1/D). The log ratio of the two
    densities is mean·D·x − mean²·D/2, and each text has images − 1 negatives.
    """
    rng = np.random.default_rng(seed)
    ztxt = unit(rng.standard_normal((images, dim)))
    cosine = np.clip(rng.normal(mean, dim**-0.5, (images, 1)), -0.99, 0.99)
    across = rng.standard_normal((images, dim))
    across = unit(across - (across * ztxt).sum(1, keepdims=True) * ztxt)
    zimg = cosine * ztxt + np.sqrt(1 - cosine**2) * across
    return zimg, ztxt, mean * dim, -(mean**2) * dim / 2 - np.log(images - 1)


@pytest.mark.parametrize("shift", [0.0, 2.0, -2.0])
def test_a_model_whose_labels_are_drawn_from_its_probabilities_is_calibrated(shift):
    zimg, ztxt, t, b = calibrated_set()
    actual = logit_health(zimg, ztxt, np.arange(1500), t, b + shift, batch_size=1500, quiet=True)
    relative = actual.ece / actual.prior
    assert relative < 0.15 if shift == 0 else relative > 0.4
    if shift:
        below_even_odds = actual.calibration[2:8]
        assert all((b.predicted > b.observed) == (shift > 0) for b in below_even_odds)


def test_a_smaller_batch_needs_a_larger_bias():
    """In batches of B, the odds of the same pairs are (N − 1) / (B − 1) times as high, which b has to add."""
    zimg, ztxt, t, b = calibrated_set()
    rows = np.arange(1500)
    fitting = logit_health(zimg, ztxt, rows, t, b + np.log(1499 / 31), batch_size=32, quiet=True)
    other = logit_health(zimg, ztxt, rows, t, b, batch_size=32, quiet=True)
    assert fitting.prior == pytest.approx(1 / 32)
    assert fitting.ece < 0.2 * other.ece


@pytest.mark.parametrize("block_size", [1, 7, 40, 1000])
def test_blocks_change_nothing(block_size):
    data = random_set()
    actual, whole = health(data, 32, block_size=block_size).to_json(), health(data, 32).to_json()
    assert actual["positive"] == whole["positive"]
    assert actual["negative"] == whole["negative"]
    assert actual["ece"] == pytest.approx(whole["ece"])
    assert actual["negative_mean"] == pytest.approx(whole["negative_mean"])


def test_float32_rows_are_counted_like_float64_ones():
    data = random_set()
    narrow = health((data[0].astype(np.float32), data[1].astype(np.float32), *data[2:]))
    wide = health(data)
    assert np.abs(np.subtract(narrow.negative, wide.negative)).sum() <= 4
    assert narrow.ece == pytest.approx(wide.ece, rel=1e-3)


def test_equal_captions_are_no_negatives_of_each_others_images():
    """Two images with the same caption: all four pairs match, and there is no negative."""
    zimg = unit(np.random.default_rng(0).standard_normal((2, 4)))
    ztxt = np.repeat(zimg[:1], 2, axis=0)
    rows = np.arange(2)
    same = logit_health(zimg, ztxt, rows, T, B, batch_size=2, text_ids=np.zeros(2, int), quiet=True)
    different = logit_health(zimg, ztxt, rows, T, B, batch_size=2, quiet=True)
    assert (sum(same.negative), sum(different.negative)) == (0, 2)
    assert same.negative_mean is None
    assert same.prior == 1
    assert same.to_json()["negatives"] == 0


def test_nothing_as_large_as_all_pairs_is_ever_allocated():
    """The largest tensor stays the same when there are sixteen times as many pairs."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    actual = []
    for times in (1, 4):
        with Largest() as largest:
            health(random_set(images=500 * times, texts=500 * times), block_size=32)
        actual.append(largest.elements)
    assert actual[0] == actual[1]
    assert actual[0] < 500 * 500 / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zimg": np.empty((0, 4))}, "0 images and 3 texts"),
        ({"ztxt": np.ones((2, 4))}, "every row of ztxt"),
        ({"image_of_text": np.array([0, 1, 9])}, "rows of zimg"),
        ({"ztxt": np.full((3, 4), np.nan)}, "finite"),
        ({"zimg": np.full((3, 4), np.inf)}, "finite"),
        ({"t": float("nan")}, "t must be"),
        ({"b": float("inf")}, "b finite"),
    ],
)
def test_invalid_arguments_are_refused(change, message):
    arguments = {"zimg": np.eye(3, 4), "ztxt": np.eye(3, 4), "image_of_text": np.arange(3), "t": T, "b": B} | change
    with pytest.raises(ValueError, match=message):
        logit_health(**arguments, batch_size=2, quiet=True)


@pytest.mark.parametrize("k", [3, 100])
def test_nearest_rows_are_those_of_the_whole_matrix_without_the_row_itself(k):
    rows = unit(np.random.default_rng(0).standard_normal((30, 6)).astype(np.float32))
    queries = np.array([4, 0, 29])
    cosines, actual = nearest_rows(queries, rows, k)
    whole = rows @ rows.T
    np.fill_diagonal(whole, -np.inf)
    best = np.argsort(-whole[queries], axis=1)[:, : min(k, 29)]
    assert actual.tolist() == best.tolist()
    assert cosines == pytest.approx(np.take_along_axis(whole[queries], best, 1), abs=1e-6)
