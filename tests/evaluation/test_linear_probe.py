"""The probe is logistic regression at its optimum: gradients vanish, and the weights are those of scikit-learn."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from siglit.evaluation import linear_probe
from siglit.evaluation.linear_probe import accuracies_by_l2, fit, fit_standardizer, objective, probe

CLASSES, WIDTH = 6, 9
CPU = torch.device("cpu")


def images(count, seed=0, noise=2.0):
    """(N, D) float16 outputs that are not normalized, one of the features large; (N,) classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    rows = (
        3
        + 2 * np.random.default_rng(99).normal(size=(CLASSES, WIDTH))[labels]
        + noise * rng.normal(size=(count, WIDTH))
    )
    rows[:, 0] *= 40
    return rows.astype(np.float16), labels


def features(count=240, device=CPU):
    rows, labels = images(count)
    return fit_standardizer(rows, device, torch.float64)(rows), torch.from_numpy(labels).to(device)


def by_autograd(x, y, weight, bias, l2):
    """The definition in one line each, with torch's own cross-entropy and derivatives."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    loss = F.cross_entropy(x @ weight.T + bias, y) + l2 / 2 * (weight**2).sum()
    return loss.detach(), *torch.autograd.grad(loss, (weight, bias))


@pytest.mark.parametrize("at_once", [1 << 24, 50])
def test_objective_and_gradient_are_torchs(monkeypatch, at_once, device):
    """Also where the logits are held for a few rows at a time."""
    monkeypatch.setattr(linear_probe, "_LOGITS_AT_ONCE", at_once)
    x, y = features(device=device)
    torch.manual_seed(0)
    weight, bias = (torch.randn(*size).double().to(device) for size in ((CLASSES, WIDTH), (CLASSES,)))
    for actual, expected in zip(objective(x, y, weight, bias, 0.3), by_autograd(x, y, weight, bias, 0.3), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_gradient_vanishes_at_the_fitted_weights(l2, device):
    x, y = features(device=device)
    model = fit(x, y, CLASSES, l2)
    _, *gradients = by_autograd(x, y, model.weight, model.bias, l2)
    assert max(float(g.abs().max()) for g in gradients) < 1e-8
    assert model.gradient < 1e-8
    assert float(model.weight.abs().max()) > 0.01


def test_float32_reaches_the_same_weights(device):
    x, y = features(device=device)
    exact, actual = fit(x, y, CLASSES, 1e-2), fit(x.float(), y, CLASSES, 1e-2)
    torch.testing.assert_close(actual.weight.double(), exact.weight, atol=2e-3, rtol=1e-3)
    assert actual.gradient < 1e-4


def test_weights_are_those_of_scikit_learn():
    """At C = 1 / (l2 · N); the bias is free of the penalty there too."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = features()
    for l2 in (1e-1, 1e-3):
        model = fit(x, y, CLASSES, l2)
        theirs = linear_model.LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000).fit(
            x.numpy(), y.numpy()
        )
        np.testing.assert_allclose(model.weight.numpy(), theirs.coef_, atol=1e-5)
        # A common shift of all biases changes nothing.
        ours, other = model.bias.numpy(), theirs.intercept_
        np.testing.assert_allclose(ours - ours.mean(), other - other.mean(), atol=1e-5)


def test_features_have_mean_0_and_deviation_1(monkeypatch):
    rows, _ = images(100)
    monkeypatch.setattr(linear_probe, "_ROWS_AT_ONCE", 7)
    exact = rows.astype(np.float64)
    actual = fit_standardizer(rows, CPU, torch.float64)(rows).numpy()
    np.testing.assert_allclose(actual, (exact - exact.mean(0)) / (exact.std(0) + 1e-5), atol=1e-10)


def test_the_start_does_not_change_the_fitted_weights():
    x, y = features()
    from_zero = fit(x, y, CLASSES, 1e-3)
    from_far = fit(x, y, CLASSES, 1e-3, start=fit(x, y, CLASSES, 1e-5))
    torch.testing.assert_close(from_far.weight, from_zero.weight, atol=1e-5, rtol=1e-5)


def test_the_fit_does_not_use_the_held_out_rows():
    """With wrong labels for the held-out rows alone, the accuracy on them drops."""
    x, y = features(400)
    honest = accuracies_by_l2(x, y, CLASSES, 40)
    assert list(honest) == [1.0, 0.1, 0.01, 0.001, 0.0001, 1e-5, 1e-6]
    assert max(honest.values()) > 0.5
    shifted = torch.cat([y[:-40], (y[-40:] + 1) % CLASSES])
    assert max(accuracies_by_l2(x, shifted, CLASSES, 40).values()) < 0.3


def test_the_probe_classifies_test_images_with_its_best_penalty():
    (rows, labels), (test, test_labels) = images(600), images(300, seed=1)
    passes = []
    actual = probe(rows, labels, test, test_labels, CLASSES, device=CPU, on_pass=lambda: passes.append(1))
    best = max(actual.held_out.values())
    assert actual.l2 == max(l2 for l2, share in actual.held_out.items() if share == best), "the strongest of the best"
    x, y = fit_standardizer(rows, CPU)(rows), torch.from_numpy(labels)
    model = fit(x, y, CLASSES, actual.l2)
    logits = fit_standardizer(rows, CPU)(test) @ model.weight.T + model.bias
    assert actual.test.top[1] == pytest.approx(float((logits.argmax(1).numpy() == test_labels).mean()), abs=0.01)
    assert actual.test.top[1] > 0.5
    assert set(actual.test.top) == {1, 5}
    assert len(passes) > 10


def test_constant_outputs_score_no_more_than_chance(device):
    """All rows are equal: logits depend on the biases alone, and ties count against the probe."""
    rows = np.ones((120, WIDTH), np.float16)
    labels = np.arange(120) % CLASSES
    actual = probe(rows, labels, rows[:60], labels[:60], CLASSES, device=torch.device(device)).test
    assert actual.top[1] <= 1 / CLASSES + 1e-9


@pytest.mark.cuda
def test_cuda_gives_the_accuracy_of_the_cpu():
    (rows, labels), (test, test_labels) = images(600), images(300, seed=1)
    here = probe(rows, labels, test, test_labels, CLASSES, device=CPU)
    there = probe(rows, labels, test, test_labels, CLASSES, device=torch.device("cuda"))
    assert there.test.top[1] == pytest.approx(here.test.top[1], abs=0.02)
