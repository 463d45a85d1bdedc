"""Ranks that call the loss in a loop compare what they do without waiting, and all of them notice a difference."""

import pytest
import torch
import torch.distributed as dist

from siglit.loss import sigmoid_loss, softmax_loss
from siglit.loss.agreement import Agreement


def call_in_turn(rank, size, odd_call, loss):
    """What each of 4 calls raises, and the last check, if rank 1 once has another option (not another message)."""
    agreement, raised = Agreement(), []
    for call in range(4):
        odd = rank == 1 and call == odd_call
        zimg, ztxt = torch.ones(4, 3), torch.ones(4, 3, requires_grad=True)
        try:
            if loss == "softmax":
                softmax_loss(zimg, ztxt, 7.0, agreement=agreement)
            else:
                ambiguous = "positive" if odd else "drop"
                sigmoid_loss(zimg, ztxt, 7.0, -3.0, ambiguous=ambiguous, agreement=agreement)
            raised.append(None)
        except ValueError as error:
            raised.append(str(error))
    return raised, agreement.last()


@pytest.mark.parametrize("odd_call", range(4))
def test_a_rank_that_differs_is_noticed_by_all_in_the_next_call(ranks, odd_call):
    """In the first call at once; after the last one by the check before its result is used."""
    for rank, (raised, last) in enumerate(ranks.run(call_in_turn, 2, odd_call, "sigmoid")):
        messages = [*raised, last]
        noticed = [call for call, message in enumerate(messages) if message is not None]
        assert noticed == [0 if odd_call == 0 else odd_call + 1]
        message = messages[noticed[0]]
        if odd_call == 0:
            assert "rank 0: " in message
            assert "rank 1: " in message
        else:
            assert message.startswith(
                "the ranks did not agree in the last step: rank 1 differed from rank 0; this rank:"
            )
            assert ("positive" in message) == (rank == 1)


def test_ranks_that_agree_are_never_stopped(ranks):
    for raised, last in ranks.run(call_in_turn, 3, -1, "softmax"):
        assert raised == [None] * 4
        assert last is None


def calls_of_one_loss(rank, size, exchange, image_gradient):
    """Names of what the second and later calls of a loop do to the group, and whether a value was read."""
    agreement, names = Agreement(), []
    zimg = torch.ones(4, 3, requires_grad=image_gradient)
    ztxt = torch.ones(4, 3, requires_grad=True)
    sigmoid_loss(zimg, ztxt, 7.0, -3.0, exchange=exchange, agreement=agreement)
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    observed = (gather, "all_gather_object", "all_reduce", "batch_isend_irecv", "barrier")
    with pytest.MonkeyPatch.context() as patch:
        for name in observed:
            real = getattr(dist, name)
            patch.setattr(dist, name, lambda *a, _n=name, _r=real, **k: (names.append(_n), _r(*a, **k))[1])
        sigmoid_loss(zimg, ztxt, 7.0, -3.0, exchange=exchange, agreement=agreement)
    return [name.replace(gather, "all_gather") for name in names]


@pytest.mark.parametrize(("image_gradient", "messages"), [(False, 2), (True, 4)])
def test_a_call_gathers_its_digest_and_exchanges_blocks_and_nothing_more(ranks, image_gradient, messages):
    for names in ranks.run(calls_of_one_loss, 3, "shift", image_gradient):
        assert names == ["all_gather"] + ["batch_isend_irecv"] * messages
