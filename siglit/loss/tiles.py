"""Matrix products of tiles in the precision that the losses promise, and the size of a tile.

Knows neither losses nor ranks. Shapes: n texts, m images, D embedding width.
"""

from collections.abc import Iterator

import torch

_ELEMENTS = {"cpu": (2**20, 2**21), "cuda": (2**24, 2**26)}
"""Pairs per tile by device: uncompiled, where each step is a pass over memory that writes another tile, and compiled
into one kernel. On a CPU a tile should stay near the caches; on CUDA it must keep thousands of cores busy."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type of logits, sums and gradients: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def tiles(
    n: int, m: int, chunk_size: int | None, device: torch.device, compiled: bool = False
) -> Iterator[tuple[slice, slice]]:
    """Cut n × m pairs into tiles, row by row.

    Args:
        n: texts (rows).
        m: images (columns).
        chunk_size: rows and columns of a tile; None: chosen for the device.
        device: where the tiles are computed.
        compiled: whether the elementwise part is compiled into one kernel.

    Yields:
        (rows, columns) of each tile.
    """
    if chunk_size is None:
        elements = _ELEMENTS.get(device.type, _ELEMENTS["cuda"])[compiled]
        across = min(m, 2048 if device.type == "cpu" else 8192)
        down = max(1, elements // across)
    else:
        down = across = chunk_size
    for top in range(0, n, down):
        for left in range(0, m, across):
            yield slice(top, min(top + down, n)), slice(left, min(left + across, m))


def cosines(ztxt: torch.Tensor, zimg: torch.Tensor) -> torch.Tensor:
    """Return the (n, m) dot products of (n, D) texts and (m, D) images, accumulated in float32 or wider."""
    dtype = wide(ztxt.dtype)
    if ztxt.dtype in (torch.bfloat16, torch.float16) and ztxt.is_cuda:
        return torch.mm(ztxt, zimg.T, out_dtype=dtype)
    return ztxt.to(dtype) @ zimg.to(dtype).T


def add_product(total: torch.Tensor, grad_logits: torch.Tensor, rows: torch.Tensor) -> None:
    """Add (n, m) grad_logits × (m, D) rows to the (n, D) total in place, accumulated in the type of the total."""
    if grad_logits.dtype == total.dtype:
        total.addmm_(grad_logits, rows.to(total.dtype))
    elif grad_logits.is_cuda:
        total += torch.mm(grad_logits, rows, out_dtype=total.dtype)
    else:
        total += grad_logits @ rows


def grad_logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of grad_logits in matrix products: bfloat16 for bfloat16 inputs, else `wide`.

    float16 would lose small gradients: those of negatives below 6e-8.
    """
    return dtype if dtype == torch.bfloat16 else wide(dtype)
