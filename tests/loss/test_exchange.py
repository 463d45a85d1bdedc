"""Blocks reach every rank once and their gradients return to the owner; ranks that disagree fail together."""

import pytest
import torch
import torch.distributed as dist

from siglit.loss import Negatives, sigmoid_loss, softmax_loss
from siglit.loss.exchange import BlockExchange, gather_rows, world
from tests.loss.reference import EXCHANGES, MemoryWatch, assert_equal, batch, leaves, sigmoid, value_and_gradients

SIZES = (1, 2, 3, 4)
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def visit_all_blocks(rank, size, exchange):
    """Owners in order, whether each block was its owner's, and the returned sum of 10^rank over the ranks."""
    rows, ids = torch.full((2, 3), float(rank)), torch.tensor([rank, rank + 100])
    blocks, owners, correct = BlockExchange([rows, ids], exchange), [], True
    for owner, (block, of_block) in blocks:
        owners.append(owner)
        correct &= bool((block == owner).all()) and of_block.tolist() == [owner, owner + 100]
        blocks.return_grad(torch.full((2, 3), 10.0**rank * (1 + owner)))
    assert rows.eq(rank).all()
    return owners, correct, blocks.local_grad


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", SIZES)
def test_every_block_comes_by_once_and_the_sum_of_its_gradients_returns_to_its_owner(ranks, size, exchange):
    for rank, (owners, correct, local_grad) in enumerate(ranks.run(visit_all_blocks, size, exchange)):
        assert sorted(owners) == list(range(size))
        assert correct
        assert local_grad.unique().tolist() == [(1 + rank) * float("1" * size)]


def sent_before_the_first_block(rank, size, exchange):
    """How many transfers have been started, and how many waited for, when the first block can be worked on."""
    started, waited = [], []
    real = {name: getattr(dist, name) for name in ("batch_isend_irecv", "broadcast", GATHER)}

    def counted(name):
        def call(*args, **options):
            works = real[name](*args, **options)
            started.extend(works if isinstance(works, list) else [works])
            return works

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(dist, name, counted(name))
        patch.setattr("siglit.loss.exchange.wait", lambda works: waited.extend(w.wait() for w in works))
        blocks = iter(BlockExchange([torch.ones(2, 3)], exchange))
        next(blocks)
        counts = len(started), len(waited)
        list(blocks)
    return counts


@pytest.mark.parametrize(
    ("exchange", "size", "started", "waited"),
    [
        # Of a message sent and one received; three ranks do so both ways round the ring.
        ("bidir", 2, 2, 0),
        ("shift", 2, 2, 0),
        ("bidir", 3, 4, 0),
        ("shift", 3, 2, 0),
        # The first owner's block has come by now, and the second's is on its way.
        ("reduce", 2, 2, 1),
        ("gather", 2, 1, 0),
        ("gather", 3, 1, 0),
    ],
)
def test_the_next_block_is_on_its_way_before_the_first_is_worked_on(ranks, exchange, size, started, waited):
    assert ranks.run(sent_before_the_first_block, size, exchange) == [(started, waited)] * size


@pytest.mark.parametrize("exchange", [*EXCHANGES, None])
def test_one_process_has_its_own_block_only(exchange, device):
    rows, block_grad = torch.zeros(2, 3, device=device), torch.ones(2, 3, device=device)
    blocks = BlockExchange([rows], exchange)
    for owner, (block,) in blocks:
        assert (owner, block.data_ptr()) == (0, rows.data_ptr())
        blocks.return_grad(block_grad)
    assert blocks.local_grad is block_grad
    assert world() == (1, 0)
    assert gather_rows(rows).data_ptr() == rows.data_ptr()


def gather(rank, size):
    return gather_rows(torch.full((2, 1), rank, requires_grad=False))


def test_gathered_rows_are_in_the_order_of_the_ranks(ranks):
    assert [g.flatten().tolist() for g in ranks.run(gather, 3)] == [[0, 0, 1, 1, 2, 2]] * 3


def in_group(rank, size, exchange):
    """The loss of ranks 1 and 2 among themselves, each with 4 pairs."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    zimg, ztxt, _ = batch(8, 5)
    mine = slice(4 * (rank - 1), 4 * rank)
    inputs = leaves(zimg[mine], ztxt[mine], 7.0, -3.0)
    loss = sigmoid_loss(*inputs, group=group, exchange=exchange, chunk_size=3)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_group_of_some_ranks_trains_like_one_process_on_their_pairs(ranks, exchange):
    first, second = ranks.run(in_group, 3, exchange)[1:]
    expected = value_and_gradients(sigmoid, *batch(8, 5)[:2], 7.0, -3.0)
    actual = [(a + b) / 2 if a.ndim == 0 else torch.cat([a, b]) / 2 for a, b in zip(first, second, strict=True)]
    assert_equal(actual, expected)


def call_with_an_odd_rank(rank, size, odd, which):
    """The message that this rank gets if the call of rank `odd` differs from the others; then a valid call."""
    n, dim, dtype, options, loss = 4, 3, torch.float32, {}, sigmoid_loss
    if rank == odd:
        n = {"size": 5, "empty": 0}.get(which, n)
        dim = 2 if which == "width" else dim
        dtype = torch.bfloat16 if which == "type" else dtype
        changed = {
            "exchange": {"exchange": "shift"},
            "unknown exchange": {"exchange": "mail"},
            "chunk": {"chunk_size": 0},
            "negatives": {"negatives": Negatives("random", 1, seed=1)},
            "ids": {"image_ids": torch.arange(4)},
            "statistics": {"statistics": {}},
        }
        options = changed.get(which, {})
    if which == "other ids":
        options = {"image_ids" if rank == odd else "text_ids": torch.arange(4)}
    zimg, ztxt = torch.ones(n, dim, dtype=dtype), torch.ones(n, dim, dtype=dtype, requires_grad=True)
    zimg.requires_grad_(which == "gradient" and rank == odd)
    if which == "no batch" and rank == odd:
        zimg = ztxt = torch.tensor(1.0)
    message = None
    try:
        if which == "loss" and rank == odd:
            softmax_loss(zimg, ztxt, 7.0)
        else:
            loss(zimg, ztxt, 7.0, -3.0, **options)
    except ValueError as error:
        message = str(error)
    sigmoid_loss(torch.ones(2, 3), torch.ones(2, 3), 7.0, -3.0)
    return message


@pytest.mark.parametrize(
    "which",
    [
        "size",
        "empty",
        "width",
        "type",
        "no batch",
        "exchange",
        "unknown exchange",
        "chunk",
        "negatives",
        "ids",
        "other ids",
        "gradient",
        "statistics",
        "loss",
    ],
)
@pytest.mark.parametrize(("size", "odd"), [(2, 1), (3, 0)])
def test_ranks_that_disagree_all_raise_at_once_and_describe_each_ranks_call(ranks, size, odd, which):
    messages = ranks.run(call_with_an_odd_rank, size, odd, which, timeout=30)
    for message in messages:
        assert message is not None
        assert all(f"rank {rank}: " in message for rank in range(size))
        assert message == messages[0]


def peak(rank, size, exchange, n, image_encoder):
    zimg, ztxt = (torch.ones(n, 64, requires_grad=on) for on in (image_encoder, True))
    with MemoryWatch() as watch:
        loss = sigmoid_loss(zimg, ztxt, 7.0, -3.0, exchange=exchange, chunk_size=32)
    assert loss.requires_grad
    return watch.peak


@pytest.mark.parametrize("image_encoder", [False, True], ids=["locked", "unlocked"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_memory_does_not_grow_with_the_number_of_ranks_but_for_gather(ranks, exchange, image_encoder):
    """The most bytes alive during a call, in blocks of B × D float32; a block of gradients is one too."""
    block = 128 * 64 * 4
    blocks = [max(ranks.run(peak, size, exchange, 128, image_encoder)) / block for size in SIZES[1:]]
    if exchange == "gather":
        assert blocks[2] > blocks[0] + 1.9
    else:
        assert max(blocks) < (14 if image_encoder else 7), blocks


def backward(rank, size, loss, exchange):
    """Operations of torch.distributed in forward and in backward, everything trainable."""
    zimg, ztxt, ids = batch(6, 4)
    inputs = leaves(zimg, ztxt, 7.0, -3.0)
    with MemoryWatch() as forward:
        if loss == "softmax":
            value = softmax_loss(*inputs[:3], exchange=exchange)
        else:
            masks = {"negatives": Negatives("hardest", 1), "image_ids": ids[0]} if loss == "masked" else {}
            value = sigmoid_loss(*inputs, exchange=exchange, **masks)
    with MemoryWatch() as after:
        value.backward()
    assert after.names
    return [[name for name in watch.names if "c10d" in name] for watch in (forward, after)]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("loss", ["plain", "masked", "softmax"])
def test_backward_communicates_nothing(ranks, loss, exchange):
    for in_forward, in_backward in ranks.run(backward, 3, loss, exchange):
        assert in_forward
        assert in_backward == []
