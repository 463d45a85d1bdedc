"""Encode captions and images as unit rows for evaluation, each distinct caption once.

Knows the towers only as functions. Shapes: N inputs of any kind, M captions, L tokens, D embedding width.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from siglit.runtime.progress import Meter


def encode_ids(
    tower: Callable[[torch.Tensor], torch.Tensor],
    ids: np.ndarray,
    *,
    batch_size: int,
    device: torch.device,
    quiet: bool = False,
) -> np.ndarray:
    """Embed (M, L) token ids as (M, D) float32 unit rows; equal captions share one pass through the tower."""
    distinct, inverse = np.unique(ids, axis=0, return_inverse=True)
    rows = encode(tower, distinct.astype(np.int64), batch_size=batch_size, device=device, unit="captions", quiet=quiet)
    return rows[inverse.reshape(-1)]


def encode(
    tower: Callable[[torch.Tensor], torch.Tensor],
    inputs: np.ndarray,
    *,
    batch_size: int,
    device: torch.device,
    unit: str,
    quiet: bool = False,
) -> np.ndarray:
    """Embed (N, …) inputs as (N, D) float32 unit rows; `unit` is the plural noun that the progress shows."""
    parts = []
    with torch.inference_mode(), Meter("encoding", len(inputs), unit, quiet=quiet) as meter:
        for start in range(0, len(inputs), batch_size):
            block = torch.from_numpy(inputs[start : start + batch_size]).to(device)
            parts.append(F.normalize(tower(block).float(), dim=1).cpu().numpy())
            meter.advance(len(block))
    return np.concatenate(parts)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Normalize (N, D) float16 tower outputs to float32 unit rows."""
    return F.normalize(torch.from_numpy(rows).float(), dim=1).numpy()
