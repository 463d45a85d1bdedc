"""The mean of a cache's rows, which `image_tower.center` subtracts; kept beside the embeddings, never computed twice.

Knows caches alone. Shapes: N images, W width of the image tower.
"""

import warnings
from pathlib import Path

import numpy as np

from siglit.cache import EmbeddingCache
from siglit.data.saved_array import load_saved
from siglit.runtime.files import append_checksum, atomic_write, remove_leftovers
from siglit.runtime.progress import Meter

_BLOCK = 65_536


def mean_row(cache: EmbeddingCache) -> np.ndarray:
    """Return the (W,) float32 mean of the cache's N rows as the tower made them, summed in float64.

    Kept in a file named after the cache's digest, with a checksum. Where the folder cannot be written, the mean is
    computed each time, with a warning.
    """
    path = Path(cache.path) / f"mean-{cache.digest[:16]}.npy"
    saved = load_saved(path, (cache.dim,), np.float32)
    if saved is not None:
        return np.array(saved)
    remove_leftovers(path.parent, "mean-*.npy")
    total = np.zeros(cache.dim)
    with Meter(f"mean of {cache.path}", len(cache), "rows") as meter:
        for start in range(0, len(cache), _BLOCK):
            rows = cache.gather(np.arange(start, min(start + _BLOCK, len(cache))))
            total += rows.sum(axis=0, dtype=np.float64)
            meter.advance(len(rows))
    mean = (total / len(cache)).astype(np.float32)
    try:
        with atomic_write(path) as file:
            np.save(file, mean)
            append_checksum(file)
    except OSError as error:
        warnings.warn(
            f"cannot write the mean row into {cache.path} ({error.strerror}); it is computed again each time",
            stacklevel=2,
        )
    return mean
