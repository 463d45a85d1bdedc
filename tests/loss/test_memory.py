"""`memory_bytes` states what a call of the loss holds: it is compared with counted bytes."""

import pytest
import torch

from siglit.loss import memory_bytes, sigmoid_loss
from tests.loss.reference import EXCHANGES, TrainingMonitor


def peak(rank, size, exchange, n, dim, chunk, image_gradient, dtype=torch.float32):
    """Most bytes alive during one call."""
    zimg = torch.ones(n, dim, dtype=dtype, requires_grad=image_gradient)
    ztxt = torch.ones(n, dim, dtype=dtype, requires_grad=True)
    with TrainingMonitor() as monitor:
        sigmoid_loss(zimg, ztxt, 7.0, -3.0, exchange=exchange, chunk_size=chunk)
    return monitor.peak
