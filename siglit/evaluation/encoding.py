"""Captions and images to unit rows for evaluation, each distinct text encoded once.

Knows the text tower only as a function on token ids. Shapes: M captions, U distinct captions, L tokens, D embedding
width.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from siglit.progress import Meter


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
    parts = []
    with torch.inference_mode(), Meter("encoding", len(distinct), "captions", quiet=quiet) as meter:
        for start in range(0, len(distinct), batch_size):
            block = torch.from_numpy(distinct[start : start + batch_size].astype(np.int64)).to(device)
            parts.append(F.normalize(tower(block).float(), dim=1).cpu().numpy())
            meter.advance(len(block))
    return np.concatenate(parts)[inverse.reshape(-1)]


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Normalise (N, D) float16 tower outputs to float32 unit rows."""
    return F.normalize(torch.from_numpy(rows).float(), dim=1).numpy()
