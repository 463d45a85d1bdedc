"""The loss and its gradients are those of the paper's formula, in every type and for tiles of any size."""

import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from siglit.loss import sigmoid_loss
from tests.conftest import ROOT
from tests.loss.reference import (
    BIAS,
    MASKS,
    SCALE,
    assert_equal,
    batch,
    leaves,
    options,
    sigmoid,
    value_and_gradients,
)

CHUNKS = (1, 3, 100, None)


def equation_1(zimg, ztxt, scale, bias):
    """Equation 1, pair by pair."""
    total = 0
    for i in range(len(zimg)):
        for j in range(len(ztxt)):
            z = 1 if i == j else -1
            total = total + torch.log(1 / (1 + torch.exp(-z * (scale * torch.dot(zimg[i], ztxt[j]) + bias))))
    return -total / len(zimg)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("n", "dim"), [(1, 3), (1, 1), (2, 1), (7, 5), (16, 32)])
def test_value_and_gradients_are_those_of_equation_1(n, dim, chunk, device):
    inputs = *batch(n, dim)[:2], 10.0, -10.0
    expected = value_and_gradients(equation_1, *inputs)
    assert_equal(value_and_gradients(sigmoid_loss, *inputs, chunk_size=chunk, device=device), expected)
    assert_equal(value_and_gradients(sigmoid, *inputs), expected)


def test_the_value_is_that_of_big_visions_formula():
    """Written out in numpy from big_vision's `trainers/proj/image_text/siglip.py`."""
    zimg, ztxt, _ = batch(9, 6)
    logits = zimg.numpy() @ ztxt.numpy().T * SCALE + BIAS
    m1_diag1 = -np.ones_like(logits) + 2 * np.eye(9)
    loglik = -np.log1p(np.exp(-m1_diag1 * logits))
    assert sigmoid_loss(zimg, ztxt, SCALE, BIAS, chunk_size=4).item() == pytest.approx(
        np.mean(-np.sum(loglik, axis=-1)), rel=1e-13
    )


def test_the_gradient_in_b_at_the_start_is_the_one_that_docs_state():
    """That is n σ(b) − σ(−b) for cosines of 0; the loss itself computes it where a batch takes milliseconds."""
    section = (ROOT / "docs" / "loss.md").read_text().partition("## The start of b")[2].partition("\n## ")[0]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in section.replace(",", "").splitlines() if line[:1] == "|"]
    table = {row[0]: [float(value.replace("−", "-")) for value in row[1:]] for row in rows[2:]}
    assert list(table) == ["b = −10", "b = −log(B − 1)", "b = 0", "−log(B − 1)"]
    sizes = [int(size.removeprefix("B = ")) for size in rows[0][1:]]
    for column, size in enumerate(sizes):
        prior = -math.log(size - 1)
        assert table["−log(B − 1)"][column] == round(prior, 3)
        zimg, ztxt = torch.eye(2, dtype=torch.float64).repeat_interleave(min(size, 512), dim=0).chunk(2)
        for name, value in (("b = −10", -10.0), ("b = −log(B − 1)", prior), ("b = 0", 0.0)):
            expected = (size - 1) / (1 + math.exp(-value)) - 1 / (1 + math.exp(value))
            assert table[name][column] == pytest.approx(expected, abs=6e-5)
            if size <= 512:
                bias = torch.tensor(value, dtype=torch.float64, requires_grad=True)
                sigmoid_loss(zimg, ztxt, SCALE, bias).backward()
                assert bias.grad.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("mask", ["plain", "ids, drop", "ids, positive"])
def test_finite_differences_confirm_every_gradient(mask, chunk):
    zimg, ztxt, ids = batch(4, 3)
    arguments = options(mask, ids)
    torch.autograd.gradcheck(
        lambda *inputs: sigmoid_loss(*inputs, chunk_size=chunk, **arguments), leaves(zimg, ztxt, 3.0, -1.0)
    )


@pytest.mark.parametrize("only", range(4), ids=["images", "texts", "t", "b"])
def test_only_inputs_that_require_gradients_get_them(only, device):
    """The correct ones, and the others none."""
    inputs = leaves(*batch(5, 4)[:2], SCALE, BIAS, device=device)
    expected = value_and_gradients(sigmoid, *batch(5, 4)[:2], SCALE, BIAS)
    for number, leaf in enumerate(inputs):
        leaf.requires_grad_(number == only)
    sigmoid_loss(*inputs).backward()
    assert_equal([inputs[only].grad.cpu()], [expected[1 + only]])
    assert all(leaf.grad is None for number, leaf in enumerate(inputs) if number != only)


def test_t_and_b_may_be_numbers(device):
    zimg, ztxt, _ = batch(5, 4)
    expected = value_and_gradients(sigmoid, zimg, ztxt, SCALE, BIAS)
    actual = value_and_gradients(sigmoid_loss, zimg, ztxt, logit_scale=SCALE, logit_bias=BIAS, device=device)
    assert_equal(actual, expected[:3])


def test_t_and_b_keep_their_shape_and_type_in_their_gradients():
    """As where they are parameters of one element, float32 or float16, beside bfloat16 embeddings."""
    zimg, ztxt, _ = batch(5, 4)
    scale, bias = torch.tensor([SCALE], requires_grad=True), torch.tensor([[BIAS]]).half().requires_grad_()
    sigmoid_loss(zimg.bfloat16(), ztxt.bfloat16(), scale, bias).backward()
    assert (scale.grad.shape, scale.grad.dtype) == ((1,), torch.float32)
    assert (bias.grad.shape, bias.grad.dtype) == ((1, 1), torch.float16)


def test_without_grad_mode_the_value_is_the_same_and_has_no_graph():
    inputs = leaves(*batch(5, 4)[:2], SCALE, BIAS)
    with torch.no_grad():
        value = sigmoid_loss(*inputs)
    assert value.grad_fn is None
    assert torch.equal(value, sigmoid_loss(*inputs).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [-500.0, 500.0])
def test_extreme_logits_stay_finite_and_correct(bias, dtype, device):
    """At scale 1000 the naive logarithm overflows; the loss and its gradients do not."""
    zimg, ztxt = (side.to(dtype) for side in batch(6, 4)[:2])
    expected = value_and_gradients(sigmoid, zimg.double(), ztxt.double(), 1000.0, bias)
    actual = value_and_gradients(sigmoid_loss, zimg, ztxt, 1000.0, bias, device=device)
    assert all(tensor.isfinite().all() for tensor in actual)
    assert actual[0].item() == pytest.approx(expected[0].item(), rel=1e-5)


# Of float32, the cosines' last digit, 1e-7, times the scale; TF32, 1e-3 per product, would be noticed. bfloat16 rounds
# grad_logits and the returned gradients, each by 2^-9; float16 the latter alone, by 2^-12.
@pytest.mark.parametrize(
    ("dtype", "of_value", "of_gradients"),
    [(torch.float32, 1e-5, 1e-4), (torch.float16, 1e-4, 1e-3), (torch.bfloat16, 1e-3, 1e-2)],
    ids=["float32", "float16", "bfloat16"],
)
def test_every_type_is_near_float64_at_a_scale_of_100(dtype, of_value, of_gradients, device):
    """Value, and gradients in relative norm, against float64 on the same rounded embeddings."""
    ztxt, noise, _ = batch(256, 64)
    zimg, ztxt = F.normalize(ztxt + 0.7 * noise).to(dtype), ztxt.to(dtype)
    expected = value_and_gradients(sigmoid, zimg.double(), ztxt.double(), 100.0, -20.0)
    actual = value_and_gradients(sigmoid_loss, zimg, ztxt, 100.0, -20.0, chunk_size=100, device=device)
    assert actual[0].dtype == torch.float32
    assert actual[0].item() == pytest.approx(expected[0].item(), rel=of_value)
    for one, other in zip(actual[1:], expected[1:], strict=True):
        assert (one.double() - other).norm() <= of_gradients * other.norm()


def test_float16_gradients_survive_under_a_gradient_scaler(device):
    """Gradients below float16's range are there after the scaler's factor, which acts before they are rounded."""
    zimg, ztxt, _ = batch(64, 32)
    inputs = leaves(zimg.half(), ztxt.half(), 1e-4, -10.0, device=device)
    expected = value_and_gradients(sigmoid, *(leaf.cpu().double() for leaf in inputs))
    # Unscaled they are about 1e-7, where float16 counts in steps of 6e-8.
    assert expected[2].abs().max() < 2e-6
    (sigmoid_loss(*inputs) * 65536).backward()
    for leaf, other in zip(inputs, expected[1:], strict=True):
        actual = leaf.grad.cpu().double() / 65536
        assert actual.isfinite().all()
        assert (actual - other).norm() <= 1e-3 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_bit(dtype, device):
    """Value and gradients under autocast are those without it; bfloat16 logits would be far off."""
    zimg, ztxt = (side.to(device, dtype) for side in batch(64, 48)[:2])
    expected = value_and_gradients(sigmoid_loss, zimg, ztxt, 100.0, BIAS, device=device)
    with torch.autocast(device, torch.bfloat16):
        actual = value_and_gradients(sigmoid_loss, zimg, ztxt, 100.0, BIAS, device=device)
        rough = (ztxt @ zimg.T).float()
    assert actual[0].dtype == torch.float32
    assert all(torch.equal(*both) for both in zip(actual, expected, strict=True))
    assert (rough - ztxt.float() @ zimg.float().T).abs().max() > 1e-4


@pytest.mark.parametrize("mask", MASKS)
def test_two_calls_give_the_same_bits(mask, device):
    """On a GPU too: no sum depends on the order in which threads arrive."""
    zimg, ztxt, ids = batch(40, 8)
    inputs, arguments = (zimg.float(), ztxt.float(), SCALE, BIAS), {"chunk_size": 7, **options(mask, ids)}
    calls = [value_and_gradients(sigmoid_loss, *inputs, device=device, **arguments) for _ in range(2)]
    assert all(torch.equal(*both) for both in zip(*calls, strict=True))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_statistics_are_those_of_the_formula_and_change_nothing(mask, chunk, device):
    zimg, ztxt, ids = batch(9, 4)
    arguments, actual, expected = options(mask, ids), {}, {}
    sigmoid(zimg, ztxt, SCALE, BIAS, statistics=expected, **arguments)
    inputs = zimg, ztxt, SCALE, BIAS
    arguments |= {"chunk_size": chunk, "device": device}
    without = value_and_gradients(sigmoid_loss, *inputs, **arguments)
    counted = value_and_gradients(sigmoid_loss, *inputs, statistics=actual, **arguments)
    assert all(torch.equal(*both) for both in zip(counted, without, strict=True))
    assert actual.keys() == expected.keys()
    assert_equal([actual[name].cpu() for name in expected], [value.double() for value in expected.values()])


def statistics(rank, size, mask, exchange):
    zimg, ztxt, ids = batch(4 * size, 5)
    rows, actual = slice(4 * rank, 4 * rank + 4), {}
    sigmoid_loss(zimg[rows], ztxt[rows], SCALE, BIAS, exchange=exchange, statistics=actual, **options(mask, ids, rows))
    return actual


@pytest.mark.parametrize("mask", ["plain", "ids, positive", "hardest"])
@pytest.mark.parametrize("exchange", ["bidir", "gather"])
def test_statistics_are_those_of_the_global_batch_on_every_rank(ranks, mask, exchange):
    zimg, ztxt, ids = batch(12, 5)
    expected = {}
    sigmoid(zimg, ztxt, SCALE, BIAS, statistics=expected, **options(mask, ids))
    for actual in ranks.run(statistics, 3, mask, exchange):
        assert_equal([actual[name] for name in expected], [value.double() for value in expected.values()])


# Dynamo looks at the attribute and hides the warning itself, where it is no error.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_function_may_call_the_loss():
    """Value and gradients as without; the loss itself stays a break in the graph."""

    def step(x, y, t, b):
        return sigmoid_loss(F.normalize(x), F.normalize(y), t.exp(), b) * 2

    x, y, _ = batch(6, 4)
    expected = value_and_gradients(step, x, y, 1.0, BIAS)
    assert_equal(value_and_gradients(torch.compile(step, backend="aot_eager"), x, y, 1.0, BIAS), expected, 1e-12)
