"""The precision of float32 matrix products within a block. Knows no towers, no losses and no settings of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set the precision of float32 matrix products in this process, and restore the earlier one afterwards.

    Args:
        precision: as in `torch.set_float32_matmul_precision`: "highest" for float32, "high" for TF32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
