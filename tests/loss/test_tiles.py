"""Tiles cover every pair once, and products of tiles are as wide as they promise."""

import pytest
import torch

from siglit.loss.tiles import add_product, cosines, grad_logits_dtype, tiles, wide

CPU = torch.device("cpu")


@pytest.mark.parametrize("chunk", [1, 3, 5, 100, None])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (5, 12)])
def test_tiles_cover_every_pair_once_and_are_no_larger_than_chunk_size(n, m, chunk):
    visits = torch.zeros(n, m, dtype=torch.int64)
    for rows, columns in tiles(n, m, chunk, CPU):
        visits[rows, columns] += 1
        assert max(rows.stop - rows.start, columns.stop - columns.start) <= (chunk or 12)
    assert visits.eq(1).all()


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_devices_own_tiles_do_not_grow_with_the_batch(device, compiled):
    def largest(n):
        sides = next(tiles(n, n, None, torch.device(device), compiled))
        return sides[0].stop * sides[1].stop

    assert largest(2**15) == largest(2**20) <= 2**26
    assert largest(100) == 100 * 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_products_are_those_of_wide_numbers(dtype, device):
    """In bfloat16 the cosines would be off by 1e-2; grad_logits are only rounded where they were given rounded."""
    generator = torch.Generator().manual_seed(0)
    ztxt, zimg = (torch.randn(n, 300, generator=generator).to(device, dtype) for n in (5, 7))
    cos = cosines(ztxt, zimg)
    assert cos.dtype == wide(dtype)
    torch.testing.assert_close(cos.double(), ztxt.double() @ zimg.double().T, rtol=1e-5, atol=1e-4)
    total = torch.ones(5, 300, dtype=wide(dtype), device=device)
    grad_logits = cos.to(grad_logits_dtype(dtype))
    add_product(total, grad_logits, zimg)
    exact = 1 + grad_logits.double() @ zimg.double()
    assert (total - exact).norm() < (5e-3 if dtype == torch.bfloat16 else 1e-6) * exact.norm()
