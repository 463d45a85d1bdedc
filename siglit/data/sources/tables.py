"""Rows of parquet files or of a Hub data set, addressed by number, with the image column read apart from the rest.

Knows columns and row groups; `table_source.py` makes samples of the rows.
"""

import bisect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import override

from siglit.errors import UserError


class Table(Protocol):
    """Rows addressed by number, whose image column is read apart from the rest."""

    names: list[str]
    rows: int

    def is_integer(self, name: str) -> bool:
        """Whether the column holds integers."""

    def check_image(self, name: str) -> None:
        """Check that the column can hold images.

        Raises:
            UserError: its type is not binary, a path or a struct {bytes, path}.
        """

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
        """Bytes of a column, uncompressed; of all columns where one alone is unknown."""


class ParquetTable(Table):
    """Parquet files one after another; keeps the last row group of the image and of the other columns in memory."""

    def __init__(self, paths: list[Path]) -> None:
        """Read the footers of the files.

        Raises:
            UserError: a file is not parquet.
        """
        self._paths = paths
        self._schemas: list[pa.Schema] = []
        self._row_groups: list[tuple[int, int, int]] = []  # (file, row group, row of the file it starts at)
        self._starts: list[int] = []
        self._last_read: dict[tuple[str, ...], tuple[int, pa.Table]] = {}
        self.rows = 0
        for number, path in enumerate(paths):
            try:
                with pq.ParquetFile(path) as file:
                    self._schemas.append(file.schema_arrow)
                    sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            except (pa.ArrowException, OSError) as error:
                raise UserError(
                    f"{path} is not a readable parquet file: {_one_line(error)}. Download it again."
                ) from error
            for group, size in enumerate(sizes):
                self._row_groups.append((number, group, sum(sizes[:group])))
                self._starts.append(self.rows)
                self.rows += size
        self.names = [name for name in self._schemas[0].names if all(name in s.names for s in self._schemas)]

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes receive a copy; the row groups held here may be hundreds of megabytes.
        return self.__dict__ | {"_last_read": {}}

    @override
    def is_integer(self, name: str) -> bool:
        return all(pa.types.is_integer(schema.field(name).type) for schema in self._schemas)

    @override
    def check_image(self, name: str) -> None:
        for path, schema in zip(self._paths, self._schemas, strict=True):
            kind = schema.field(name).type
            parts = {field.name for field in kind} if pa.types.is_struct(kind) else set()
            text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            if not (text or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or parts & {"bytes", "path"}):
                raise UserError(
                    f"{path}: column {name} is {kind}, expected binary, a path, or a struct {{bytes, path}}. "
                    "Set image_column."
                )

    @override
    def place(self, row: int) -> str:
        path, number = self._locate(row)
        return f"row {number} of {path}"

    @override
    def key(self, row: int) -> str:
        path, number = self._locate(row)
        return f"{path.stem}:{number}"

    @override
    def folder(self, row: int) -> str:
        return str(self._locate(row)[0].parent)

    @override
    def records(self, start: int, stop: int, names: Sequence[str]) -> list[dict[str, Any]]:
        if len(names) == 0:
            return [{} for _ in range(start, stop)]
        records: list[dict[str, Any]] = []
        while start < stop:
            first, table = self._group(start, tuple(names))
            piece = table.slice(start - first, stop - start)
            records += piece.to_pylist()
            start += piece.num_rows
        return records

    @override
    def value(self, row: int, name: str) -> Any:
        first, table = self._group(row, (name,))
        return table.column(0)[row - first].as_py()

    @override
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
        file, _, first = self._row_groups[index]
        return self._paths[file], first + row - self._starts[index]

    def _group(self, row: int, names: tuple[str, ...]) -> tuple[int, pa.Table]:
        """Number of the first row of the row group that holds `row`, and the group's columns."""
        index = self._index(row)
        group_read = self._last_read.get(names)
        if group_read is None or group_read[0] != index:
            # Dropped before the next is read: one is in memory, not two.
            group_read = None
            self._last_read.pop(names, None)
            file, group, _ = self._row_groups[index]
            try:
                with pq.ParquetFile(self._paths[file]) as parquet:
                    group_read = (index, parquet.read_row_group(group, columns=list(names)))
            except (pa.ArrowException, OSError) as error:
                raise UserError(
                    f"{self._paths[file]}, row group {group} cannot be read: {_one_line(error)}. Download it again."
                ) from error
            self._last_read[names] = group_read
        return self._starts[index], group_read[1]


class HubTable(Table):
    """A split of a data set on the Hugging Face Hub, through the optional package `datasets`; runs none of its code."""

    def __init__(self, name: str, split: str) -> None:
        """Load the split.

        Raises:
            UserError: the package is missing, or the data set cannot be loaded.
        """
        try:
            import datasets
        except ImportError as error:
            raise UserError("source format hub needs the package datasets: pip install 'siglit[hub]'") from error
        self._name, self._split = name, split
        try:
            self._data: Any = datasets.load_dataset(name, split=split)
            self._views: dict[str, Any] = {}
        # Offline, no such set, no such split, a set that runs code: each has an exception type of its own.
        except Exception as error:
            raise UserError(
                f"hub data set {name} (split {split}) could not be loaded: {type(error).__name__}: {_one_line(error)}. "
                "Or download its parquet files and use format: parquet with their path."
            ) from error
        self._image_type = datasets.Image
        self.rows = len(self._data)
        self.names = list(self._data.column_names)

    def identity(self) -> dict[str, Any]:
        """Rows and size stand for the content; a data set in a local folder is identified by the folder's last name."""
        name = Path(self._name).name if os.path.exists(self._name) else self._name
        size = getattr(self._data.info, "dataset_size", None)
        return {"dataset": name, "rows": self.rows, "columns": self.names, "size": size}

    @override
    def is_integer(self, name: str) -> bool:
        return str(getattr(self._data.features[name], "dtype", "")).startswith(("int", "uint"))

    @override
    def check_image(self, name: str) -> None:
        if isinstance(self._data.features[name], self._image_type):
            self._data = self._data.cast_column(name, self._image_type(decode=False))
            self._views = {}

    @override
    def place(self, row: int) -> str:
        return f"row {row} of {self._name}, split {self._split}"

    @override
    def key(self, row: int) -> str:
        return f"{self._split}:{row}"

    @override
    def folder(self, row: int) -> str:
        return ""

    @override
    def records(self, start: int, stop: int, names: Sequence[str]) -> list[dict[str, Any]]:
        if len(names) == 0:
            return [{} for _ in range(start, stop)]
        columns = self._data.select_columns(list(names))[start:stop]
        return [{name: columns[name][i] for name in names} for i in range(stop - start)]

    @override
    def value(self, row: int, name: str) -> Any:
        if name not in self._views:  # a view costs as much as thirty images
            self._views[name] = self._data.select_columns([name])
        return self._views[name][row][name]

    @override
    def size(self, name: str) -> int:
        return int(self._data.data.nbytes)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300]
