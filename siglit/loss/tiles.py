"""Matrix products of tiles in the precision that the losses promise, and how large a tile may be.

Knows neither losses nor ranks. Shapes: n own rows, m visiting rows, D embedding width.
"""

from collections.abc import Iterator

import torch

_ELEMENTS = {"cpu": (2**20, 2**21), "cuda": (2**24, 2**26)}
"""Pairs of a tile, by device: where each step is a pass over memory and leaves a tile behind, and where all are one
kernel. On a CPU a tile should stay near the caches; on CUDA it must keep thousands of cores busy."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of logits, sums and gradients: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def tiles(
    n: int, m: int, chunk_size: int | None, device: torch.device, in_one_kernel: bool = False
) -> Iterator[tuple[slice, slice]]:
    """Cut n × m pairs into tiles, row by row.

    Args:
        n: own rows.
        m: visiting rows.
        chunk_size: rows and columns of a tile; None: chosen for the device.
        device: where they will be.
        in_one_kernel: whether the elementwise part is compiled.
    """
    if chunk_size is None:
        elements = _ELEMENTS.get(device.type, _ELEMENTS["cuda"])[in_one_kernel]
        across = min(m, 2048 if device.type == "cpu" else 8192)
        down = max(1, elements // across)
    else:
        down = across = chunk_size
    for top in range(0, n, down):
        for left in range(0, m, across):
            yield slice(top, min(top + down, n)), slice(left, min(left + across, m))


def cosines(own: torch.Tensor, visiting: torch.Tensor) -> torch.Tensor:
    """(n, D) × (m, D) to (n, m) dot products, accumulated and returned in float32 or wider."""
    dtype = wide(own.dtype)
    if own.dtype == torch.bfloat16 and own.is_cuda:
        return torch.mm(own, visiting.T, out_dtype=dtype)
    return own.to(dtype) @ visiting.to(dtype).T


def add_product(total: torch.Tensor, slope: torch.Tensor, rows: torch.Tensor) -> None:
    """Add (n, m) slope × (m, D) rows to the (n, D) total, in place; accumulated in the type of the total."""
    if slope.dtype == total.dtype:
        total.addmm_(slope, rows.to(total.dtype))
    elif slope.is_cuda:
        total += torch.mm(slope, rows, out_dtype=total.dtype)
    else:
        total += slope @ rows


def slope_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type slopes are multiplied in: bfloat16 for bfloat16 inputs, else `wide`; float16 would lose small ones."""
    return dtype if dtype == torch.bfloat16 else wide(dtype)
