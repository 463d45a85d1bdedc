"""Few-shot accuracy is big_vision's: the same draws, and the same ridge regression, solved differently."""

import numpy as np
import pytest

from siglit.evaluation import fewshot
from siglit.evaluation.fewshot import draw_shots, fit_ridge

CLASSES = 4


def images(count, width, seed=0):
    """(N, D) float16 outputs with large norms, a constant feature and one of great scale; (N,) classes."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % CLASSES)
    centers = np.random.default_rng(99).normal(size=(CLASSES, width))
    rows = 5 + centers[labels] + 2 * rng.normal(size=(count, width))
    rows[:, 0], rows[:, 1] = 2.0, 50 * rows[:, 1]
    return rows.astype(np.float16), labels


def big_vision(x, y, x_test, y_test, l2):
    """_precompute_cache and _eig_fewshot_acc_fn of big_vision's fewshot_lsr, transcribed to numpy in float64."""
    x, x_test = x.astype(np.float64), x_test.astype(np.float64)
    mean, std = x.mean(0, keepdims=True), x.std(0, keepdims=True) + 1e-5
    x = np.pad((x - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)
    y = 2.0 * np.eye(CLASSES)[y] - 1.0
    if len(x) >= x.shape[1]:
        eigs, q = np.linalg.eigh(x.T @ x)
        rhs, lhs = q.T @ (x.T @ y), q
    else:
        eigs, q = np.linalg.eigh(x @ x.T)
        rhs, lhs = q.T @ y, x.T @ q
    x_test = np.pad((x_test - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)
    w = (lhs * (1.0 / (eigs + l2)).reshape(1, -1)) @ rhs
    return w, float(np.mean(np.argmax(x_test @ w, axis=1) == y_test))


@pytest.mark.parametrize("count", [20, 60, 200])
def test_accuracy_is_that_of_big_vision(count):
    """More features than shots, and fewer."""
    (x, y), (x_test, y_test) = images(count, 59), images(500, 59, seed=1)
    model = fit_ridge(x, y, CLASSES)
    weights, accuracy = big_vision(x, y, x_test, y_test, 2.0**10)
    np.testing.assert_allclose(model.weights, weights, rtol=1e-6, atol=1e-9)
    assert float((model.predict(x_test) == y_test).mean()) == accuracy
    assert 0.3 < accuracy < 1


@pytest.mark.parametrize("count", [20, 200])
def test_weights_solve_the_normal_equations(count):
    """(XᵀX + λI) W = XᵀY, whichever system was solved."""
    x, y = images(count, 59)
    model = fit_ridge(x, y, CLASSES)
    z = (x.astype(np.float64) - x.astype(np.float64).mean(0)) / (x.astype(np.float64).std(0) + 1e-5)
    z = np.hstack([z, np.full((count, 1), 100.0)])
    targets = np.where(y[:, None] == np.arange(CLASSES), 1.0, -1.0)
    direct = np.linalg.solve(z.T @ z + 1024 * np.eye(60), z.T @ targets)
    np.testing.assert_allclose(model.weights, direct, rtol=1e-7, atol=1e-10)


def test_weights_are_those_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = images(200, 59)
    model = fit_ridge(x, y, CLASSES, l2=32.0)
    z = np.hstack([(x - model.mean) / model.std, np.full((200, 1), 100.0)])
    theirs = linear_model.Ridge(alpha=32.0, fit_intercept=False).fit(z, 2.0 * np.eye(CLASSES)[y] - 1)
    np.testing.assert_allclose(model.weights, theirs.coef_.T, atol=1e-9)


def test_prediction_in_blocks_is_prediction(monkeypatch):
    x, y = images(100, 10)
    model = fit_ridge(x, y, CLASSES)
    whole = model.predict(x)
    monkeypatch.setattr(fewshot, "_ROWS_AT_ONCE", 7)
    np.testing.assert_array_equal(model.predict(x), whole)


def test_draws_are_those_of_big_vision():
    _, labels = images(300, 2)
    labels[::10] = -1
    draw = np.random.default_rng(2)
    indices = [draw.permutation(np.where(labels == c)[0]) for c in range(CLASSES)]
    actual = draw_shots(labels, np.arange(CLASSES), [1, 5, 25], seed=2)
    for k, rows in actual.items():
        np.testing.assert_array_equal(rows, np.concatenate([of[:k] for of in indices]))
        assert np.bincount(labels[rows]).tolist() == [k] * CLASSES
        assert len(set(rows.tolist())) == k * CLASSES
    assert set(actual[1].tolist()) < set(actual[5].tolist())
    assert actual[5].tolist() != draw_shots(labels, np.arange(CLASSES), [5], seed=3)[5].tolist()


def test_classes_may_have_any_numbers():
    labels = np.array([7, 3, 7, 3, 900, 900, -1])
    rows = draw_shots(labels, np.array([3, 7, 900]), [2], seed=0)[2]
    np.testing.assert_array_equal(labels[rows], [3, 3, 7, 7, 900, 900])


def test_more_shots_than_images_are_refused():
    with pytest.raises(ValueError, match="cannot draw 3 images of every class: one class has 2"):
        draw_shots(np.array([0, 0, 1, 1, 1]), np.arange(2), [1, 3], seed=0)
