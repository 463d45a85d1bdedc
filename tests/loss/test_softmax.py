"""The softmax loss is the mean of two cross-entropies, and any number of ranks trains like one process."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from siglit.loss import softmax_loss
from tests.loss.reference import (
    EXCHANGES,
    SCALE,
    assert_equal,
    batch,
    leaves,
    open_clip_loss,
    softmax,
    value_and_gradients,
)

PAIRS, DIM = 5, 6
CASES = list(itertools.product(EXCHANGES, (None, 1, 2, 7), (True, False)))


@pytest.mark.parametrize("chunk", [1, 3, 100, None])
@pytest.mark.parametrize(("n", "dim"), [(1, 3), (1, 1), (2, 1), (7, 5), (16, 32)])
def test_value_and_gradients_are_those_of_cross_entropy(n, dim, chunk, device):
    inputs = *batch(n, dim)[:2], 10.0
    actual = value_and_gradients(softmax_loss, *inputs, chunk_size=chunk, device=device)
    assert_equal(actual, value_and_gradients(softmax, *inputs))


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_finite_differences_confirm_every_gradient(chunk):
    inputs = leaves(*batch(4, 3)[:2], 3.0)
    torch.autograd.gradcheck(lambda *inputs: softmax_loss(*inputs, chunk_size=chunk), inputs)


def losses_and_gradients(rank, size):
    """Of each case, this rank's loss and gradients of its images (if not locked), its texts and t."""
    zimg, ztxt, _ = batch(size * PAIRS, DIM)
    mine, results = slice(rank * PAIRS, (rank + 1) * PAIRS), []
    for exchange, chunk, locked in CASES:
        inputs = leaves(zimg[mine], ztxt[mine], SCALE)
        inputs[0].requires_grad_(not locked)
        loss = softmax_loss(*inputs, exchange=exchange, chunk_size=chunk)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in inputs if leaf.requires_grad)])
    return results


def mean_over_ranks(of_ranks):
    size = len(of_ranks)
    return [sum(t) / size if t[0].ndim == 0 else torch.cat(t) / size for t in zip(*of_ranks, strict=True)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_loss_and_gradients_are_those_of_one_process_on_the_global_batch(ranks, size):
    """For every exchange, chunk size, and locked or unlocked image side; the mean over ranks, as DDP takes it."""
    expected = value_and_gradients(softmax, *batch(size * PAIRS, DIM)[:2], SCALE)
    for (_, _, locked), *results in zip(CASES, *ranks.run(losses_and_gradients, size), strict=True):
        assert_equal(mean_over_ranks(results), [expected[0], *expected[2 if locked else 1 :]])


def beside_open_clip(rank, size):
    """Loss and gradients of this rank by softmax_loss and by open_clip's ClipLoss."""
    peer = open_clip_loss().ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=size)
    zimg, ztxt, _ = batch(size * PAIRS, DIM)
    mine = slice(rank * PAIRS, (rank + 1) * PAIRS)
    inputs = zimg[mine], ztxt[mine], SCALE
    return value_and_gradients(softmax_loss, *inputs), value_and_gradients(peer, *inputs)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_mean_over_ranks_is_that_of_open_clips_clip_loss(ranks, size):
    open_clip_loss()
    ours, theirs = zip(*ranks.run(beside_open_clip, size), strict=True)
    assert_equal(mean_over_ranks(ours), mean_over_ranks(theirs))


def test_only_inputs_that_require_gradients_get_them(device):
    expected = value_and_gradients(softmax, *batch(5, 4)[:2], SCALE)
    for only in range(3):
        inputs = leaves(*batch(5, 4)[:2], SCALE, device=device)
        for number, leaf in enumerate(inputs):
            leaf.requires_grad_(number == only)
        softmax_loss(*inputs).backward()
        assert_equal([inputs[only].grad.cpu()], [expected[1 + only]])
        assert all(leaf.grad is None for number, leaf in enumerate(inputs) if number != only)


def test_without_grad_mode_the_value_is_the_same():
    inputs = leaves(*batch(5, 4)[:2], SCALE)
    with torch.no_grad():
        value = softmax_loss(*inputs)
    assert value.grad_fn is None
    assert torch.equal(value, softmax_loss(*inputs).detach())


@pytest.mark.parametrize("noise", [1.2, 1.6, 3.0], ids=["fitted", "half fitted", "not fitted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float64(dtype, noise, device):
    """Also where probabilities of own pairs are so near 1 that bfloat16 could not tell what is left to learn."""
    ztxt, other, _ = batch(256, 64)
    zimg, ztxt = F.normalize(ztxt + noise * other).to(dtype), ztxt.to(dtype)
    expected = value_and_gradients(softmax, zimg.double(), ztxt.double(), 30.0)
    actual = value_and_gradients(softmax_loss, zimg, ztxt, 30.0, chunk_size=100, device=device)
    assert actual[0].item() == pytest.approx(expected[0].item(), rel=1e-3)
    for one, exact in zip(actual[1:], expected[1:], strict=True):
        assert (one.double() - exact).norm() <= 1e-2 * exact.norm()


def test_extreme_logits_stay_finite(device):
    zimg, ztxt, _ = batch(6, 4)
    actual = value_and_gradients(softmax_loss, zimg.float(), ztxt.float(), 1e4, device=device)
    expected = value_and_gradients(softmax, zimg, ztxt, 1e4)
    assert all(tensor.isfinite().all() for tensor in actual)
    assert actual[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
