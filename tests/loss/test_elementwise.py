"""Losses and their gradients are correct to float32's last digits, compiled or not; a failure to compile warns once."""

import shutil
import warnings

import pytest
import torch
from torch.nn import functional as F

from siglit.loss import elementwise, sigmoid_loss
from siglit.loss.elementwise import all_negative, fused, signed
from tests.loss.reference import BIAS, SCALE, assert_equal, batch, value_and_gradients

# Below −87 the loss is a denormal float32, with too few digits for a relative error.
LOGITS = torch.linspace(-87, 100, 20_001)[:, None]


@pytest.fixture
def compile_all(monkeypatch):
    """Compile calls of any size; no failure is remembered from before, nor afterwards."""
    monkeypatch.setattr(elementwise, "COMPILE_FROM", 1)
    monkeypatch.setattr(elementwise, "_failures", [])
    elementwise._compiled.cache_clear()
    yield
    elementwise._compiled.cache_clear()
    torch._dynamo.reset()


def assert_accurate(function, device, tolerance=1e-6):
    """The loss of single pairs and its gradient, against float64."""
    scale, bias = torch.tensor([1.0, 0.0], device=device)
    results = function(LOGITS.to(device, copy=True), scale, bias, torch.float32)
    grad_logits, loss, grad_sum, products = (result.cpu() for result in results)
    exact = LOGITS.double()
    softplus, grad = torch.logaddexp(exact, torch.zeros_like(exact)), torch.sigmoid(exact)
    for actual, expected in ((loss, softplus), (grad_logits, grad), (grad_sum, grad), (products, grad * exact)):
        error = (actual.double().flatten() - expected.flatten()).abs() / expected.flatten().abs().clamp_min(1e-300)
        assert error.max() < tolerance


def test_uncompiled_values_are_correct_to_a_millionth(device):
    assert_accurate(all_negative, device)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_values_are_correct_to_a_millionth(compile_all, device):
    """The one test that really compiles, some ten seconds; on CUDA by Triton, which needs the compiler too.

    There 1e-5: before torch 2.15, exp(x) is exp2(x · log2 e) with a product in float32, off by 6e-6 at -87.
    """
    compiled = fused(all_negative, 1)
    with warnings.catch_warnings():
        # Warnings of torch itself must not look like a missing compiler; our own warning is tested below.
        warnings.simplefilter("ignore")
        assert_accurate(compiled, device, tolerance=1e-6 if device == "cpu" else 1e-5)
    assert elementwise._failures == []


def test_positives_flip_the_sign_of_their_logit_and_masked_pairs_add_nothing():
    cosines = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positive, kept = cosines > 0.5, cosines < 0.9
    scale, bias = torch.tensor(3.0), torch.tensor(-1.0)
    grad_logits, *sums = signed(cosines, scale, bias, positive, kept, torch.float64)
    logits = (cosines * scale + bias).requires_grad_()
    loss = -F.logsigmoid(torch.where(positive, logits, -logits)) * kept
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert_equal([grad_logits, *sums], [grad, loss.sum(1).detach(), grad.sum(1), (grad * cosines).sum(1)], 1e-14)


def test_a_failure_to_compile_warns_once_and_leaves_the_uncompiled_values(compile_all, monkeypatch):
    inputs = *(side.float() for side in batch(6, 4)[:2]), SCALE, BIAS
    tries = []

    def no_compiler(function, **_):
        tries.append(function)
        raise RuntimeError("No working C++ compiler found\nin any of the usual places")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.warns(
        UserWarning, match="not compiled and therefore slower: No working C\\+\\+ compiler found$"
    ) as warned:
        first = value_and_gradients(sigmoid_loss, *inputs)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = value_and_gradients(sigmoid_loss, *inputs)
    assert len(tries) == 1
    monkeypatch.setattr(elementwise, "COMPILE_FROM", 2**26)
    assert_equal(first, value_and_gradients(sigmoid_loss, *inputs), 0)
    assert_equal(second, first, 0)


def test_small_calls_never_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    elementwise._compiled.cache_clear()
    value_and_gradients(sigmoid_loss, *batch(300, 4)[:2], SCALE, BIAS)
    assert fused(all_negative, elementwise.COMPILE_FROM - 1) is all_negative
    assert fused(all_negative, elementwise.COMPILE_FROM) is not all_negative
