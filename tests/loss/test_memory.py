"""`memory_bytes` states what a call of the loss holds: it is compared with counted bytes."""

import pytest
import torch

from siglit.loss import memory_bytes, sigmoid_loss
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
    """But for the block just finished and its gradient, which live until the next one is there."""
    actual = max(ranks.run(peak, 4, exchange, 128, 64, 32, image_gradient))
    stated = memory_bytes(128, 64, world_size=4, exchange=exchange, image_gradient=image_gradient, chunk_size=32)
    finished = 128 * 64 * 4 * (2 if image_gradient else 1)
    assert 0.5 * (stated.rows + stated.tile) <= actual <= 1.1 * (stated.rows + stated.tile) + finished


def test_a_compiled_tile_is_a_quarter_and_bfloat16_products_are_kept_beside_it():
    def tile(dtype, compiled):
        return memory_bytes(64, 8, dtype=dtype, chunk_size=64, compiled=compiled).tile / 64**2

    assert [tile(torch.float32, compiled) for compiled in (False, True)] == [16, 4]
    assert [tile(torch.bfloat16, compiled) for compiled in (False, True)] == [16, 6]
