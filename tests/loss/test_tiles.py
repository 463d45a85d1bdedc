"""Tiles cover every pair once, and products of tiles are as wide as they promise."""

import pytest
import torch

from siglit.loss.tiles import add_product, cosines, slope_dtype, tiles, wide

CPU = torch.device("cpu")


@pytest.mark.parametrize("chunk", [1, 3, 5, 100, None])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (5, 12)])
def test_tiles_cover_every_pair_once_and_are_no_larger_than_asked(n, m, chunk):
    seen = torch.zeros(n, m, dtype=torch.int64)
    for rows, columns in tiles(n, m, chunk, CPU):
        seen[rows, columns] += 1
        assert max(rows.stop - rows.start, columns.stop - columns.start) <= (chunk or 12)
    assert seen.eq(1).all()


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("in_one_kernel", [False, True])
def test_a_devices_own_tiles_do_not_grow_with_the_batch(device, in_one_kernel):
    def largest(n):
        sides = next(tiles(n, n, None, torch.device(device), in_one_kernel))
        return sides[0].stop * sides[1].stop

    assert largest(2**15) == largest(2**20) <= 2**26
    assert largest(100) == 100 * 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_products_are_those_of_wide_numbers(dtype):
    """In bfloat16 the cosines would be off by 1e-2; slopes are only rounded where they were given rounded."""
    own, visiting = (torch.randn(n, 300, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (5, 7))
    found = cosines(own, visiting)
    assert found.dtype == wide(dtype)
    torch.testing.assert_close(found.double(), own.double() @ visiting.double().T, rtol=1e-5, atol=1e-4)
    total = torch.ones(5, 300, dtype=wide(dtype))
    slope = found.to(slope_dtype(dtype))
    add_product(total, slope, visiting)
    exact = 1 + slope.double() @ visiting.double()
    assert (total - exact).norm() < (5e-3 if dtype == torch.bfloat16 else 1e-6) * exact.norm()
