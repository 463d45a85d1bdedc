"""Read a user's plain HDF5 file of embeddings, block by block: named datasets with one row per image.

Knows nothing of caches; it is in this package because only this package imports h5py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from siglit.cache.format import CacheError


class PlainHdf5:
    """Datasets of one file, read row by row together.

    Attributes:
        path: the file.
        rows: n.

    Raises:
        CacheError: the file is not readable as HDF5, a dataset is missing, or the datasets differ in rows.
    """

    def __init__(self, path: Path, names: list[str]) -> None:
        """Check that the datasets `names` exist and have the same number of rows, (n, …)."""
        self.path, self._names = path, names
        with self._file() as file:
            missing = [name for name in names if not isinstance(file.get(name), h5py.Dataset)]
            if len(missing) > 0:
                raise CacheError(f"{path} has no dataset {missing[0]!r}; it has {', '.join(file)}")
            shapes = {name: file[name].shape for name in names}
        if len({shape[:1] for shape in shapes.values()}) != 1:
            raise CacheError(f"{path}: the datasets have different numbers of rows: {shapes}")
        self.rows: int = shapes[names[0]][0]

    def names(self) -> list[str]:
        """Names of all datasets at the top level of the file."""
        with self._file() as file:
            return [name for name in file if isinstance(file[name], h5py.Dataset)]

    def blocks(self, size: int) -> Iterator[dict[str, Any]]:
        """The rows in order, at most `size` at a time: {name: array, or list of text}."""
        with self._file() as file:
            for start in range(0, self.rows, size):
                yield {name: _values(file[name], start, start + size) for name in self._names}

    def _file(self) -> h5py.File:
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise CacheError(f"{self.path} cannot be read as HDF5 ({error})") from None


def _values(dataset: h5py.Dataset, start: int, stop: int) -> np.ndarray | list[Any]:
    if h5py.check_string_dtype(dataset.dtype) is not None:
        return dataset.asstr()[start:stop].tolist()
    return dataset[start:stop]
