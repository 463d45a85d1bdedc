"""Read a user's plain HDF5 file of embeddings, block by block: named datasets with one row per image.

Knows nothing of caches; it is in this package because only this package imports h5py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from siglit.cache.format import CacheError, own_dataset
from siglit.runtime.files import check_regular
from siglit.runtime.text import first_line


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
            present = ", ".join(file) or "none"
            try:
                shapes = {name: own_dataset(file, name).shape for name in names}
            except KeyError:
                missing = next(name for name in names if name not in file)
                raise CacheError(f"{path} has no dataset {missing!r}; it has {present}. Choose another file") from None
            except TypeError as error:
                raise CacheError(f"{path}: {error}; copy the values into this file") from None
        if len({shape[:1] for shape in shapes.values()}) != 1 or () in shapes.values():
            counts = ", ".join(
                f"{name} {'x'.join(map(str, shape)) or 'a single value'}" for name, shape in shapes.items()
            )
            raise CacheError(
                f"{path}: the datasets have different numbers of rows ({counts}); expected one row per image"
            )
        self.rows: int = shapes[names[0]][0]

    def names(self) -> list[str]:
        """Names of all datasets at the top level of the file."""
        with self._file() as file:
            links = {name: file.get(name, getclass=True, getlink=True) for name in file}
            # A link to another file is not followed, so that it is refused where it is chosen.
            return [n for n, kind in links.items() if kind is not h5py.HardLink or isinstance(file[n], h5py.Dataset)]

    def blocks(self, size: int) -> Iterator[dict[str, Any]]:
        """The rows in order, at most `size` at a time: {name: array, or list of text}."""
        with self._file() as file:
            for start in range(0, self.rows, size):
                yield {name: _values(file[name], start, start + size) for name in self._names}

    def _file(self) -> h5py.File:
        try:
            check_regular(self.path)
            return h5py.File(self.path, "r")
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise CacheError(f"{self.path} cannot be read as HDF5 ({reason}); check the path") from None


def _values(dataset: h5py.Dataset, start: int, stop: int) -> np.ndarray | list[Any]:
    """Rows of a dataset.

    Raises:
        CacheError: its text is not UTF-8, a part of it is damaged, or the rows do not fit into memory.
    """
    try:
        return _read(dataset, start, stop)
    except (OSError, MemoryError, UnicodeDecodeError) as error:
        where = f"{dataset.file.filename}, dataset {dataset.name.removeprefix('/')!r}"
        raise CacheError(f"{where} cannot be read ({first_line(error)}); write the file again") from None


def _read(dataset: h5py.Dataset, start: int, stop: int) -> np.ndarray | list[Any]:
    if h5py.check_string_dtype(dataset.dtype) is not None:
        return dataset.asstr("utf-8")[start:stop].tolist()
    return dataset[start:stop]
