"""An array in a .npy file that can be computed again: loaded if it is whole. Knows nothing of what it holds."""

import contextlib
import logging
from pathlib import Path

import numpy as np

from siglit.runtime.files import has_checksum

_logger = logging.getLogger(__name__)


def load_saved(path: Path, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray | None:
    """Map the array that a file holds before its checksum, for which all of the file is read once.

    A file of an earlier siglit ends with the array and has no checksum; it is loaded too.

    Args:
        path: of the file.
        shape: that the array must have.
        dtype: likewise.

    Returns:
        The array; None where there is no file, or, with a warning, a damaged one.
    """
    if not path.exists():
        return None
    with contextlib.suppress(ValueError, EOFError):
        saved = np.lib.format.open_memmap(path, mode="r")
        if (saved.shape, saved.dtype) == (shape, np.dtype(dtype)):
            is_earlier = path.stat().st_size == saved.offset + saved.nbytes
            if is_earlier or has_checksum(path):
                return saved
    _logger.warning(f"{path} is damaged; what it holds is computed again")
    return None
