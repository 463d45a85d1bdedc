"""Rows of parquet files or of a Hub data set, addressed by number, with the image column read apart from the rest.

Knows columns and row groups; what a row means to a sample is the affair of `sources.py`.
"""

import bisect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from siglit.errors import UserError


class Table(Protocol):
    """Rows addressed by number, whose image column is read apart from the rest."""

    names: list[str]
    rows: int

    def is_integer(self, name: str) -> bool:
        """Whether the column holds integers."""

    def check_image(self, name: str) -> None:
        """UserError unless the column can hold images."""

    def place(self, row: int) -> str:
        """Words for a message: file and row."""

    def key(self, row: int) -> str:
        """The row's key where no column names one."""

    def folder(self, row: int) -> str:
        """Folder that relative paths in the row start from."""

    def records(self, start: int, stop: int, names: Sequence[str]) -> list[dict[str, Any]]:
        """The named columns of rows start to stop - 1."""

    def value(self, row: int, name: str) -> Any:
        """One cell."""

    def size(self, name: str) -> int:
        """Bytes of a column, unpacked; of all columns where it cannot be told."""


class ParquetTable:
    """Parquet files one after another; keeps the last row group of the image and of the other columns in memory."""

    def __init__(self, paths: list[Path]) -> None:
        """Read the footers of the files; UserError names one that is not parquet."""
        self._paths = paths
        self._schemas: list[pa.Schema] = []
        self._spans: list[tuple[int, int, int]] = []  # (file, row group, row of the file it starts at)
        self._starts: list[int] = []
        self._cache: dict[tuple[str, ...], tuple[int, pa.Table]] = {}
        self.rows = 0
        for number, path in enumerate(paths):
            try:
                with pq.ParquetFile(path) as file:
                    self._schemas.append(file.schema_arrow)
                    sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            except (pa.ArrowException, OSError) as error:
                raise UserError(
                    f"{path} is not a readable parquet file: {_one_line(error)}. Fetch it again."
                ) from error
            for group, size in enumerate(sizes):
                self._spans.append((number, group, sum(sizes[:group])))
                self._starts.append(self.rows)
                self.rows += size
        self.names = [name for name in self._schemas[0].names if all(name in s.names for s in self._schemas)]

    def __getstate__(self) -> dict[str, Any]:
        # Loader workers receive a copy; the row groups held here may be hundreds of megabytes.
        return self.__dict__ | {"_cache": {}}

    def is_integer(self, name: str) -> bool:
        return all(pa.types.is_integer(schema.field(name).type) for schema in self._schemas)

    def check_image(self, name: str) -> None:
        for path, schema in zip(self._paths, self._schemas, strict=True):
            kind = schema.field(name).type
            parts = {field.name for field in kind} if pa.types.is_struct(kind) else set()
            text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            if not (text or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or parts & {"bytes", "path"}):
                raise UserError(
                    f"{path}: column {name} is {kind}, but images are binary, a path, or a struct {{bytes, path}}. "
                    "Set image_column."
                )

    def place(self, row: int) -> str:
        path, number = self._locate(row)
        return f"row {number} of {path}"

    def key(self, row: int) -> str:
        path, number = self._locate(row)
        return f"{path.stem}:{number}"

    def folder(self, row: int) -> str:
        return str(self._locate(row)[0].parent)

    def records(self, start: int, stop: int, names: Sequence[str]) -> list[dict[str, Any]]:
        if not names:
            return [{} for _ in range(start, stop)]
        found: list[dict[str, Any]] = []
        while start < stop:
            first, table = self._group(start, tuple(names))
            piece = table.slice(start - first, stop - start)
            found += piece.to_pylist()
            start += piece.num_rows
        return found

    def value(self, row: int, name: str) -> Any:
        first, table = self._group(row, (name,))
        return table.column(0)[row - first].as_py()

    def size(self, name: str) -> int:
        total = 0
        for path in self._paths:
            footer = pq.read_metadata(path)
            for group in map(footer.row_group, range(footer.num_row_groups)):
                parts = map(group.column, range(group.num_columns))
                total += sum(
                    part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] == name
                )
        return total

    def _index(self, row: int) -> int:
        # The last of equal starts: an empty row group starts where its successor does.
        return bisect.bisect_right(self._starts, row) - 1

    def _locate(self, row: int) -> tuple[Path, int]:
        index = self._index(row)
        file, _, first = self._spans[index]
        return self._paths[file], first + row - self._starts[index]

    def _group(self, row: int, names: tuple[str, ...]) -> tuple[int, pa.Table]:
        """The row group that holds `row`, with the number of its first row."""
        index = self._index(row)
        held = self._cache.get(names)
        if held is None or held[0] != index:
            # Let go before the next is read: one is in memory, not two.
            held = None
            self._cache.pop(names, None)
            file, group, _ = self._spans[index]
            try:
                with pq.ParquetFile(self._paths[file]) as parquet:
                    held = (index, parquet.read_row_group(group, columns=list(names)))
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{self._paths[file]}, row group {group} cannot be read: {_one_line(error)}") from error
            self._cache[names] = held
        return self._starts[index], held[1]


class HubTable:
    """A split of a data set on the Hugging Face hub, through the optional package `datasets`; runs none of its code."""

    def __init__(self, name: str, split: str) -> None:
        """Load the split; UserError if the package is missing or the set cannot be had."""
        try:
            import datasets
        except ImportError as error:
            raise UserError("source format hub needs the package datasets: pip install 'siglit[hub]'") from error
        self._name, self._split = name, split
        try:
            self._data: Any = datasets.load_dataset(name, split=split)
            self._views: dict[str, Any] = {}
        # Offline, no such set, no such split, a set that wants to run code: each has an exception type of its own.
        except Exception as error:
            raise UserError(
                f"hub data set {name} (split {split}) could not be loaded: {type(error).__name__}: {_one_line(error)} "
                "Or download its parquet files and use format: parquet with their path."
            ) from error
        self._image_type = datasets.Image
        self.rows = len(self._data)
        self.names = list(self._data.column_names)

    def identity(self) -> dict[str, Any]:
        """Rows and size stand for the content; a set that lies in a local folder is known by its last name."""
        name = Path(self._name).name if os.path.exists(self._name) else self._name
        size = getattr(self._data.info, "dataset_size", None)
        return {"dataset": name, "rows": self.rows, "columns": self.names, "size": size}

    def is_integer(self, name: str) -> bool:
        return str(getattr(self._data.features[name], "dtype", "")).startswith(("int", "uint"))

    def check_image(self, name: str) -> None:
        if isinstance(self._data.features[name], self._image_type):
            self._data = self._data.cast_column(name, self._image_type(decode=False))
            self._views = {}

    def place(self, row: int) -> str:
        return f"row {row} of {self._name}, split {self._split}"

    def key(self, row: int) -> str:
        return f"{self._split}:{row}"

    def folder(self, row: int) -> str:
        return ""

    def records(self, start: int, stop: int, names: Sequence[str]) -> list[dict[str, Any]]:
        if not names:
            return [{} for _ in range(start, stop)]
        columns = self._data.select_columns(list(names))[start:stop]
        return [{name: columns[name][i] for name in names} for i in range(stop - start)]

    def value(self, row: int, name: str) -> Any:
        if name not in self._views:  # a view costs as much as thirty images
            self._views[name] = self._data.select_columns([name])
        return self._views[name][row][name]

    def size(self, name: str) -> int:
        return int(self._data.data.nbytes)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
