"""One row per example is kept for backward, and inputs that are not a batch of pairs raise."""

import pytest
import torch
from torch.nn import functional as F

from siglit.loss import sigmoid_loss, softmax_loss
from tests.loss.reference import BIAS, EXCHANGES, MASKS, SCALE, MemoryWatch, batch, leaves, options, sigmoid


def saved_bytes(loss, *inputs, **arguments):
    """Bytes kept for backward, each storage once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(*inputs, **arguments)
    assert value.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def saved_bytes_of_batch(n, loss, locked=False, mask="plain", **arguments):
    zimg, ztxt, ids = batch(n, 8)
    inputs = leaves(zimg.float(), ztxt.float(), SCALE, BIAS)
    inputs[0].requires_grad_(not locked)
    if loss is softmax_loss:
        return saved_bytes(loss, *inputs[:3], **arguments)
    return saved_bytes(loss, *inputs, **options(mask, ids), **arguments)


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("mask", [*MASKS, "softmax"])
def test_backward_keeps_one_row_of_gradient_for_each_trainable_example(mask, locked):
    """Not a term in B²: bytes are B × D × 4 a trainable side, and two scalars."""
    loss, mask = (softmax_loss, "plain") if mask == "softmax" else (sigmoid_loss, mask)
    for n in (64, 128):
        rows = n * 8 * 4 * (1 if locked else 2)
        assert rows <= saved_bytes_of_batch(n, loss, locked, mask, chunk_size=16) <= rows + 64


def test_the_count_notices_that_the_naive_formula_keeps_all_pairs():
    """A control of the count."""
    assert saved_bytes_of_batch(128, sigmoid) > 128 * 128 * 4


def kept_on_ranks(rank, size, exchange):
    return saved_bytes_of_batch(64, sigmoid_loss, exchange=exchange)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_what_backward_keeps_does_not_grow_with_the_number_of_ranks(ranks, exchange):
    assert set(ranks.run(kept_on_ranks, 2, exchange)) == set(ranks.run(kept_on_ranks, 4, exchange))


def test_without_grad_mode_nothing_is_kept():
    kept = []
    inputs = leaves(*batch(8, 4)[:2], SCALE, BIAS)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        sigmoid_loss(*inputs)
        softmax_loss(*inputs[:3])
    assert kept == []


def test_backward_twice_with_a_kept_graph_gives_the_same_gradients():
    inputs = leaves(*batch(8, 4)[:2], SCALE, BIAS)
    loss = sigmoid_loss(*inputs)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, grad_outputs=torch.tensor(3.0, dtype=torch.float64))
    assert all(torch.equal(3 * one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("loss", [sigmoid_loss, softmax_loss])
def test_the_last_backward_returns_the_kept_gradients_without_a_copy(loss):
    """A second copy would be the largest thing alive; where the graph is kept, only a copy is safe."""
    kept = []

    def keep(tensor):
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    inputs = leaves(*batch(8, 4)[:2], SCALE, BIAS)[: 4 if loss is sigmoid_loss else 3]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(*inputs)
    copies = torch.autograd.grad(value, inputs[:2], retain_graph=True)
    assert not {gradient.untyped_storage().data_ptr() for gradient in copies} & set(kept)
    value.backward()
    assert {tensor.grad.untyped_storage().data_ptr() for tensor in inputs[:2]} <= set(kept)


def test_second_derivatives_are_refused_rather_than_wrong():
    inputs = leaves(*batch(4, 3)[:2], SCALE, BIAS)
    (derivative,) = torch.autograd.grad(sigmoid_loss(*inputs), inputs[2], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(derivative, inputs[2])


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("loss", [sigmoid_loss, softmax_loss])
def test_forward_allocates_nothing_larger_than_a_tile_or_an_embedding(loss, locked):
    zimg, ztxt = (F.normalize(torch.randn(256, 8), dim=1).requires_grad_() for _ in range(2))
    scalars = (SCALE, BIAS) if loss is sigmoid_loss else (SCALE,)
    with MemoryWatch() as watch:
        loss(zimg.requires_grad_(not locked), ztxt, *scalars, chunk_size=40).backward()
    assert watch.largest <= 256 * 8
    with MemoryWatch() as watch:
        loss(zimg, ztxt, *scalars, chunk_size=1000)
    assert watch.largest == 256 * 256


@pytest.mark.parametrize("loss", [sigmoid_loss, softmax_loss])
@pytest.mark.parametrize(
    ("of_images", "of_texts"),
    [((4, 3), (4, 2)), ((4, 3), (5, 3)), ((3,), (3,)), ((0, 3), (0, 3)), ((1, 2, 3), (1, 2, 3)), ((), ())],
)
def test_shapes_that_are_not_a_batch_of_pairs_raise(loss, of_images, of_texts):
    scalars = (SCALE, BIAS) if loss is sigmoid_loss else (SCALE,)
    with pytest.raises(ValueError, match=r"two \(B, D\) tensors of one shape"):
        loss(torch.zeros(of_images), torch.zeros(of_texts), *scalars)


@pytest.mark.parametrize(
    ("types", "arguments", "message"),
    [
        ((torch.float32, torch.float64), {}, "one floating-point type, got torch.float32 and torch.float64"),
        ((torch.int64, torch.int64), {}, "one floating-point type"),
        ((torch.float32, torch.float32), {"chunk_size": 0}, "chunk_size is 0, it must be 1 or more"),
        ((torch.float32, torch.float32), {"exchange": "mail"}, "exchange is 'mail', it must be one of bidir, shift"),
        ((torch.float32, torch.float32), {"image_ids": torch.zeros(3)}, r"must be \(4,\), got \[\(3,\)\]"),
        ((torch.float32, torch.float32), {"text_ids": torch.zeros(4, 1)}, r"must be \(4,\), got \[\(4, 1\)\]"),
        (
            (torch.float32, torch.float32),
            {"ambiguous": "postive"},
            "ambiguous is 'postive', it must be one of drop, pos",
        ),
    ],
)
def test_invalid_arguments_raise(types, arguments, message):
    zimg, ztxt = (torch.ones(4, 3, dtype=dtype) for dtype in types)
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(zimg, ztxt, SCALE, BIAS, **arguments)
