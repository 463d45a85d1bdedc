"""Which pairs count: exactly as many negatives as requested, of the requested kind; ids change their own pairs only."""

import pytest
import torch
from torch.nn import functional as F

from siglit.loss import Negatives, sigmoid_loss
from tests.loss.reference import (
    BIAS,
    EXCHANGES,
    SCALE,
    assert_equal,
    batch,
    leaves,
    masks_of,
    sigmoid,
    value_and_gradients,
)


def some_cosines(n, dtype=torch.float64, seed=0):
    return torch.rand(n, n, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("per_positive", [0, 0.1, 1, 3.5, 18])
@pytest.mark.parametrize("keep", ["random", "hardest", "easiest"])
def test_exactly_the_requested_number_of_negatives_is_kept_and_every_positive(keep, per_positive, dtype, device):
    positive, kept = masks_of(some_cosines(20, dtype), device, negatives=Negatives(keep, per_positive), chunk_size=7)
    assert torch.equal(positive, torch.eye(20, dtype=torch.bool))
    assert int((kept & ~positive).sum()) == round(20 * per_positive)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("keep", ["hardest", "easiest"])
def test_kept_negatives_are_the_hardest_or_easiest_of_the_global_batch(keep, dtype, scale, device):
    """Also where they differ in their last bits only, and on both sides of zero."""
    cosines = some_cosines(20, dtype) * scale
    positive, kept = masks_of(cosines, device, negatives=Negatives(keep, 4), chunk_size=6)
    of_kept, of_masked = cosines[kept & ~positive], cosines[~kept & ~positive]
    assert len(of_kept) == 80
    assert of_kept.min() > of_masked.max() if keep == "hardest" else of_kept.max() < of_masked.min()


@pytest.mark.parametrize("keep", ["random", "hardest", "easiest"])
@pytest.mark.parametrize("per_positive", [19, 19.4, 1000])
def test_requesting_more_negatives_than_exist_gives_the_plain_loss(keep, per_positive, device):
    inputs = *batch(20, 6)[:2], SCALE, BIAS
    actual = value_and_gradients(sigmoid_loss, *inputs, negatives=Negatives(keep, per_positive), device=device)
    assert_equal(actual, value_and_gradients(sigmoid, *inputs), 1e-13)


@pytest.mark.parametrize("keep", ["hardest", "easiest"])
def test_ties_with_the_last_one_kept_are_kept_too(keep, device):
    cosines = torch.full((6, 6), 0.25, dtype=torch.float64)
    cosines[0, 1], cosines[0, 2] = 0.5, -0.5
    kept = masks_of(cosines, device, negatives=Negatives(keep, 1 / 3))[1]
    masked = (0, 2) if keep == "hardest" else (0, 1)
    assert (~kept).nonzero().tolist() == [list(masked)]


def test_the_random_choice_is_the_seeds_whatever_the_tiles_the_embeddings_and_the_device(device):
    negatives = Negatives("random", 3, seed=5)
    kept = masks_of(some_cosines(30), negatives=negatives)[1]
    for chunk in (1, 7, 100):
        of_chunk = masks_of(some_cosines(30, seed=chunk), device, negatives=negatives, chunk_size=chunk)[1]
        assert torch.equal(of_chunk, kept)
    other = masks_of(some_cosines(30), negatives=Negatives("random", 3, seed=6))[1]
    both = int((kept & other).sum()) - 30
    # 90 of 870 each: 9.3 are common by chance, with a deviation of 2.7.
    assert 1 <= both <= 20


def random_choice(rank, size, exchange):
    """Rows of the choice that this rank's texts see: with unit vectors as images, their gradients are grad_logits."""
    rows = slice(rank * 12 // size, (rank + 1) * 12 // size)
    (ztxt,) = leaves(some_cosines(12)[rows])
    images = torch.eye(12, dtype=torch.float64)[rows]
    sigmoid_loss(images, ztxt, 1.0, 0.0, negatives=Negatives("random", 3, seed=5), exchange=exchange).backward()
    return ztxt.grad != 0


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_random_choice_is_the_same_on_any_number_of_ranks(ranks, size, exchange):
    expected = masks_of(some_cosines(12), negatives=Negatives("random", 3, seed=5))[1]
    assert torch.equal(torch.cat(ranks.run(random_choice, size, exchange)), expected)


@pytest.mark.parametrize("seed", [0, 1, 2**40, -7])
def test_the_random_choice_is_even_over_rows_columns_and_diagonals(seed):
    """Chi-squares of the 400 counts of about 40 are within 8 deviations of what chance gives."""
    n, share = 400, 0.1
    positive, kept = masks_of(torch.zeros(n, n), negatives=Negatives("random", share * (n - 1), seed=seed))
    kept &= ~positive
    shifted = torch.stack([kept[i].roll(-i) for i in range(n)])
    for counts in (kept.sum(0), kept.sum(1), shifted.sum(0)[1:]):
        expected = share * (n - 1 if len(counts) == n else n)
        chi_square = ((counts - expected) ** 2 / (expected * (1 - share))).sum()
        assert abs(chi_square - len(counts)) < 8 * (2 * len(counts)) ** 0.5
    assert int(kept.sum()) == pytest.approx(share * n * (n - 1), abs=2)


@pytest.mark.parametrize("which", ["image_ids", "text_ids", "both"])
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_ids_change_exactly_the_pairs_that_share_one(which, chunk, device):
    """Dropping removes their terms as negatives; counting them as positives adds their terms as positives."""
    n = 10
    zimg, ztxt, ids = batch(n, 5)
    shared = {"image_ids": ids[0], "text_ids": ids[1]} if which == "both" else {which: ids[int(which == "text_ids")]}
    same = torch.stack([one[:, None] == one for one in shared.values()]).any(0) & ~torch.eye(n, dtype=torch.bool)
    assert 0 < same.sum() < n * n - n
    logits = (ztxt @ zimg.T * SCALE + BIAS)[same]
    arguments = {"chunk_size": chunk, "device": device, **shared}
    plain = value_and_gradients(sigmoid_loss, zimg, ztxt, SCALE, BIAS)[0]
    drop = value_and_gradients(sigmoid_loss, zimg, ztxt, SCALE, BIAS, **arguments)[0]
    positive = value_and_gradients(sigmoid_loss, zimg, ztxt, SCALE, BIAS, ambiguous="positive", **arguments)[0]
    torch.testing.assert_close(plain - drop, F.softplus(logits).sum() / n, rtol=0, atol=1e-12)
    torch.testing.assert_close(positive - drop, F.softplus(-logits).sum() / n, rtol=0, atol=1e-12)
    own = torch.eye(n, dtype=torch.bool)
    cosines = some_cosines(n)
    assert all(map(torch.equal, masks_of(cosines, device, **shared), (own, ~same)))
    assert all(map(torch.equal, masks_of(cosines, device, ambiguous="positive", **shared), (own | same, own | ~own)))


def test_ids_that_no_two_pairs_share_change_nothing():
    inputs = *batch(10, 5)[:2], SCALE, BIAS
    actual = value_and_gradients(sigmoid_loss, *inputs, image_ids=torch.arange(10), text_ids=2**62 - torch.arange(10))
    assert_equal(actual, value_and_gradients(sigmoid, *inputs), 1e-13)


def test_ambiguous_pairs_are_never_among_the_negatives_that_are_kept():
    """However hard they are: other pairs are kept instead."""
    cosines = some_cosines(8)
    cosines[2, 5] = cosines[5, 2] = 2.0
    ids = torch.tensor([0, 1, 2, 3, 4, 2, 6, 7])
    positive, kept = masks_of(cosines, negatives=Negatives("hardest", 1), text_ids=ids)
    assert not kept[2, 5]
    assert int((kept & ~positive).sum()) == 8


@pytest.mark.parametrize(
    ("keep", "per_positive"), [("worst", 1), ("random", -1), ("hardest", float("nan")), ("easiest", float("inf"))]
)
def test_an_invalid_choice_of_negatives_raises(keep, per_positive):
    with pytest.raises(ValueError, match="keep must be random, hardest or easiest, and per_positive a finite number"):
        Negatives(keep, per_positive)
