"""Any number of ranks trains like one process on the global batch: real gloo groups, every gradient."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from siglit.loss import sigmoid_loss
from siglit.loss.exchange import BlockExchange
from tests.loss.reference import (
    BIAS,
    EXCHANGES,
    MASKS,
    SCALE,
    assert_equal,
    batch,
    leaves,
    options,
    sigmoid,
    value_and_gradients,
)

SIZES = (1, 2, 3, 4)
PAIRS, DIM = 5, 6  # of one rank
CHUNKS = (1, 2, 7, None)


def without_the_last_block(blocks):
    return list(blocks)[:-1]


def without_the_offset(blocks):
    """Every rank takes the first rank's block for its own."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return [((owner + rank) % size, tensors) for owner, tensors in list(blocks)]


CONTROLS = {"a dropped block": without_the_last_block, "no rank offset": without_the_offset, "a factor W": None}


def losses_and_gradients(rank, size, mask, cases, control=None):
    """Of each case, this rank's loss and gradients of its images (if not locked), its texts, t and b."""
    zimg, ztxt, ids = batch(size * PAIRS, DIM)
    mine = slice(rank * PAIRS, (rank + 1) * PAIRS)
    original, change, results = BlockExchange.__iter__, CONTROLS.get(control), []
    if change is not None:
        BlockExchange.__iter__ = lambda exchange: iter(change(original(exchange)))
    try:
        for exchange, chunk, locked in cases:
            inputs = leaves(zimg[mine], ztxt[mine], SCALE, BIAS)
            inputs[0].requires_grad_(not locked)
            loss = sigmoid_loss(*inputs, exchange=exchange, chunk_size=chunk, **options(mask, ids, mine))
            loss = loss * size if control == "a factor W" else loss
            loss.backward()
            results.append([loss.detach(), *(leaf.grad for leaf in inputs if leaf.requires_grad)])
    finally:
        BlockExchange.__iter__ = original
    return results


def mean_over_ranks(of_ranks):
    """Losses and gradients as DDP combines them: the mean of scalars; the rows of all ranks, divided by W."""
    size = len(of_ranks)
    return [sum(t) / size if t[0].ndim == 0 else torch.cat(t) / size for t in zip(*of_ranks, strict=True)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradients_are_those_of_one_process_on_the_global_batch(ranks, size, mask):
    """For every exchange, chunk size, and locked or unlocked image side; the mean over ranks, as DDP takes it."""
    zimg, ztxt, ids = batch(size * PAIRS, DIM)
    expected = value_and_gradients(sigmoid, zimg, ztxt, SCALE, BIAS, **options(mask, ids))
    # Finding the kept negatives takes passes over all tiles; tests/loss/test_composition.py has more of them.
    chunks = CHUNKS[1:3] if "negatives" in MASKS[mask] else CHUNKS
    cases = list(itertools.product(EXCHANGES, chunks, (True, False)))
    of_ranks = ranks.run(losses_and_gradients, size, mask, cases)
    for (_, _, locked), *results in zip(cases, *of_ranks, strict=True):
        assert_equal(mean_over_ranks(results), [expected[0], *expected[2 if locked else 1 :]])


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("exchange", ["bidir", "reduce"])
def test_the_comparison_would_notice(ranks, exchange, control):
    """Control: with a broken exchange or a wrong factor, the comparison above fails."""
    zimg, ztxt, _ = batch(3 * PAIRS, DIM)
    expected = value_and_gradients(sigmoid, zimg, ztxt, SCALE, BIAS)
    of_ranks = ranks.run(losses_and_gradients, 3, "plain", [(exchange, None, True)], control)
    actual = mean_over_ranks([cases[0] for cases in of_ranks])
    del expected[1]
    with pytest.raises(AssertionError):
        assert_equal(actual, expected, 1e-3)


class Model(nn.Module):
    """Two small towers with t' and b; forward returns the loss, because DDP needs all of it in one forward."""

    def __init__(self, locked, exchange="bidir", loss=sigmoid_loss):
        super().__init__()
        self.images = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, DIM)).requires_grad_(not locked)
        self.texts = nn.Sequential(nn.Embedding(23, 8), nn.Flatten(), nn.LayerNorm(24), nn.Linear(24, DIM))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-4.0))
        self.loss, self.loss_options = loss, {} if exchange is None else {"exchange": exchange}

    def forward(self, pixels, words):
        zimg, ztxt = F.normalize(self.images(pixels)), F.normalize(self.texts(words))
        return self.loss(zimg, ztxt, self.log_scale.exp(), self.logit_bias, **self.loss_options)


def model_and_batch(n, *args, **keywords):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(n, 9, dtype=torch.float64, generator=generator)
    words = torch.randint(0, 23, (n, 3), generator=generator)
    torch.manual_seed(1)
    return Model(*args, **keywords).double(), pixels, words


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def model_gradients(rank, size, through_ddp):
    """Mean gradients of the model's parameters and the loss, by (exchange, locked)."""
    mine, results = slice(rank * PAIRS, (rank + 1) * PAIRS), {}
    for exchange in EXCHANGES:
        for locked in (True, False):
            model, pixels, words = model_and_batch(size * PAIRS, locked, exchange)
            # A small bucket makes DDP reduce in several pieces.
            wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001) if through_ddp else model
            loss = wrapped(pixels[mine], words[mine])
            loss.backward()
            actual = gradients(model) | {"loss": loss.detach()}
            for name, tensor in actual.items():
                if not through_ddp or name == "loss":
                    dist.all_reduce(tensor)
                    tensor.div_(size)
            results[exchange, locked] = actual
    return results


@pytest.mark.parametrize("through_ddp", [False, True], ids=["by hand", "DDP"])
@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_of_a_model_gets_the_gradient_of_one_process(ranks, size, through_ddp):
    """On every rank, with both towers trainable and with the image tower locked, for all exchanges."""
    for of_rank in ranks.run(model_gradients, size, through_ddp):
        for (_, locked), actual in of_rank.items():
            model, pixels, words = model_and_batch(size * PAIRS, locked, None, loss=sigmoid)
            loss = model(pixels, words)
            loss.backward()
            expected = gradients(model) | {"loss": loss.detach()}
            assert actual.keys() == expected.keys()
            assert ("images.0.weight" in actual) is not locked
            assert_equal(list(actual.values()), list(expected.values()))


def test_a_step_against_any_parameters_gradient_lowers_the_loss():
    model, pixels, words = model_and_batch(12, False)
    before = model(pixels, words)
    before.backward()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.sub_(1e-3 * parameter.grad)
            assert model(pixels, words) < before
            parameter.add_(1e-3 * parameter.grad)
