"""`memory_bytes` states what a call of the loss holds: it is compared with counted bytes."""

import pytest
import torch

from siglit.loss import Negatives, memory_bytes, sigmoid_loss
from tests.loss.reference import EXCHANGES, MemoryWatch


def peak(rank, size, exchange, n, dim, chunk, image_gradient, dtype=torch.float32):
    """Most bytes alive during one call."""
    zimg = torch.ones(n, dim, dtype=dtype, requires_grad=image_gradient)
    ztxt = torch.ones(n, dim, dtype=dtype, requires_grad=True)
    with MemoryWatch() as monitor:
        sigmoid_loss(zimg, ztxt, 7.0, -3.0, exchange=exchange, chunk_size=chunk)
    return monitor.peak


@pytest.mark.parametrize("image_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "chunk"), [(8, 256), (256, 32)], ids=["mostly tiles", "mostly rows"])
def test_one_process_holds_what_is_stated(dim, chunk, dtype, image_gradient):
    """But for the sums of a tile's rows and, of half-precision embeddings, a tile's rows in float32."""
    actual = peak(0, 1, None, 256, dim, chunk, image_gradient, dtype)
    stated = memory_bytes(
        256, dim, exchange=None, dtype=dtype, image_gradient=image_gradient, chunk_size=chunk, compiled=False
    )
    wide_copies = 2 * chunk * dim * 4 if dtype in (torch.bfloat16, torch.float16) else 0
    assert stated.rows + stated.tile <= actual <= 1.1 * (stated.rows + stated.tile) + wide_copies


@pytest.mark.parametrize("image_gradient", [False, True])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_ranks_hold_no_more_than_stated_and_not_much_less(ranks, exchange, image_gradient):
    """But for the block just finished, which lives until the next one is there."""
    actual = max(ranks.run(peak, 4, exchange, 128, 64, 32, image_gradient))
    stated = memory_bytes(128, 64, world_size=4, exchange=exchange, image_gradient=image_gradient, chunk_size=32)
    finished = 128 * 64 * 4
    assert 0.5 * (stated.rows + stated.tile) <= actual <= 1.1 * (stated.rows + stated.tile) + finished


def test_a_compiled_tile_is_a_quarter_and_bfloat16_products_are_kept_beside_it():
    def tile(dtype, compiled):
        return memory_bytes(64, 8, dtype=dtype, chunk_size=64, compiled=compiled).tile / 64**2

    assert [tile(torch.float32, compiled) for compiled in (False, True)] == [16, 4]
    assert [tile(torch.bfloat16, compiled) for compiled in (False, True)] == [16, 6]


@pytest.mark.parametrize("negatives", [None, Negatives("random", 3), Negatives("hardest", 3)])
@pytest.mark.parametrize("ids", [False, True])
def test_masks_take_what_is_stated(negatives, ids):
    """Not an int64 for each pair of a tile: the hashes behind a random choice are made strip by strip."""
    if negatives is None and not ids:
        return
    n, chunk = 2048, 1024
    zimg, ztxt = torch.ones(n, 8), torch.ones(n, 8, requires_grad=True)
    of_pairs = torch.arange(n) if ids else None
    with MemoryWatch() as monitor:
        sigmoid_loss(zimg, ztxt, 7.0, -3.0, chunk_size=chunk, negatives=negatives, image_ids=of_pairs)
    stated = memory_bytes(n, 8, chunk_size=chunk, selected=True, compiled=False)
    assert 0.9 * stated.tile <= monitor.peak - stated.rows <= 1.05 * stated.tile


def test_a_compiled_choice_holds_masks_and_priorities_beside_the_cosines():
    tile = memory_bytes(2**14, 8, selected=True, compiled=True, device="cuda").tile
    assert tile == 2**26 * (4 + 4 + 3) + 2**21 * 32
