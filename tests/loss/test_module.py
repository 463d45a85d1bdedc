"""SigLipLoss is open_clip's, on any number of ranks, by any of its exchanges."""

import pytest
import torch

from siglit.loss import SigLipLoss, sigmoid_loss
from tests.loss.reference import (
    BIAS,
    EXCHANGES,
    SCALE,
    assert_equal,
    batch,
    leaves,
    open_clip_loss,
    value_and_gradients,
)


@pytest.mark.parametrize("chunk", [None, 3])
def test_one_process_has_open_clips_value_and_gradients(chunk):
    inputs = *batch(7, 5)[:2], SCALE, BIAS
    peer = value_and_gradients(open_clip_loss().SigLipLoss(), *inputs)
    assert_equal(value_and_gradients(SigLipLoss(chunk_size=chunk), *inputs), peer)


def beside_open_clip(rank, size, exchange):
    """Loss and gradients of this rank's images and texts, t and b, by both."""
    zimg, ztxt, _ = batch(size * 4, 5)
    mine = slice(rank * 4, rank * 4 + 4)
    arguments = {"rank": rank, "world_size": size, "dist_impl": exchange}
    losses = SigLipLoss(**arguments), open_clip_loss().SigLipLoss(**arguments)
    return [value_and_gradients(loss, zimg[mine], ztxt[mine], SCALE, BIAS) for loss in losses]


@pytest.mark.parametrize("exchange", [None, *EXCHANGES])
@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_has_open_clips_value_and_gradients(ranks, size, exchange):
    open_clip_loss()
    for ours, peer in ranks.run(beside_open_clip, size, exchange):
        assert_equal(ours, peer)


def alone(rank, size):
    zimg, ztxt, _ = batch(8, 5)
    mine = slice(rank * 4, rank * 4 + 4)
    if rank == 1:
        return None
    return SigLipLoss()(zimg[mine], ztxt[mine], SCALE, BIAS)


def test_with_a_world_of_one_a_process_in_a_group_keeps_to_itself(ranks):
    """The other rank does not even call it."""
    zimg, ztxt, _ = batch(8, 5)
    assert_equal(ranks.run(alone, 2, timeout=30)[:1], [sigmoid_loss(zimg[:4], ztxt[:4], SCALE, BIAS)], 1e-14)


@pytest.mark.parametrize("negative_only", [False, True])
def test_logits_and_labels_are_open_clips(negative_only):
    ours, peer = SigLipLoss(), open_clip_loss().SigLipLoss()
    zimg, ztxt, _ = batch(4, 3)
    arguments = torch.device("cpu"), torch.float32, 4, negative_only
    assert torch.equal(ours.get_ground_truth(*arguments), peer.get_ground_truth(*arguments))
    for bias in (None, torch.tensor(BIAS)):
        scale = torch.tensor(SCALE)
        assert torch.equal(ours.get_logits(zimg, ztxt, scale, bias), peer.get_logits(zimg, ztxt, scale, bias))


def test_the_result_may_be_a_dictionary_and_the_bias_nothing():
    zimg, ztxt, _ = batch(4, 3)
    scale = leaves(SCALE)[0]
    actual = SigLipLoss(True)(zimg, ztxt, scale, None, output_dict=True)
    assert actual.keys() == {"contrastive_loss"}
    torch.testing.assert_close(actual["contrastive_loss"], open_clip_loss().SigLipLoss()(zimg, ztxt, scale, None))


def test_an_unknown_exchange_raises():
    with pytest.raises(ValueError, match="dist_impl is 'mail', it must be one of bidir, shift, reduce, gather"):
        SigLipLoss(dist_impl="mail")
