"""Samples in tables: parquet files and data sets of the Hugging Face Hub.

Knows how a row becomes a sample; `tables.py` reads the rows.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from typing_extensions import override

from siglit.config import SourceSpec
from siglit.data.sources.options import Fold, columns_of, identity_of
from siglit.data.sources.samples import SAMPLE_BYTES, FilePart, Sample, Source, TableCell, Unit, check_unique, row_units
from siglit.data.sources.tables import HubTable, ParquetTable, Table
from siglit.errors import UserError
from siglit.runtime.paths import expand, files_of


class TableSource(Source):
    """Columns in row groups; a unit is a range of rows, which are numbered over all files."""

    def __init__(self, spec: SourceSpec) -> None:
        """Read the headers of the files, and the key column if one is named.

        Raises:
            UserError: files or columns are missing, there is no row, a column cannot hold images, or a key occurs
                twice.
        """
        self.name = f"{spec.format} {spec.path}"
        self._spec, self._fold = spec, Fold(spec.fold)
        self._paths = files_of(spec.path, ".parquet") if spec.format == "parquet" else []
        self._table: Table = (
            ParquetTable(self._paths)
            if spec.format == "parquet"
            else HubTable(expand(spec.path, "path"), str(spec.split))
        )
        if self._table.rows == 0:
            raise UserError(f"{self.name} has no samples")
        columns = columns_of(spec)
        if columns.label is None and "label" in self._table.names and self._table.is_integer("label"):
            columns = replace(columns, label="label", label_required=False)
        self._columns = columns.resolve(spec.format, self._table.names, self.name)
        assert self._columns.image is not None
        self._table.check_image(self._columns.image)
        self._root = expand(spec.images, "images") if spec.images else None
        key = self._columns.key
        if key is not None:
            blocks = (self._table.records(start, stop, [key]) for start, stop in self._blocks())
            check_unique([record[key] for block in blocks for record in block], self._table.place)

    @override
    def identity(self) -> dict[str, Any]:
        extra = self._table.identity() if isinstance(self._table, HubTable) else {}
        return identity_of(self._spec, self._paths) | extra

    @override
    def units(self, shard_size: int) -> list[Unit]:
        return row_units(self._table.rows, shard_size, self.name)

    @override
    def load(self, unit: Unit) -> Sequence[Sample]:
        return list(self._samples(unit.start, unit.stop))

    @override
    def captions(self) -> Iterator[tuple[str, ...]]:
        return (sample.captions for start, stop in self._blocks() for sample in self._samples(start, stop))

    @override
    def memory(self) -> int:
        return self._table.rows * SAMPLE_BYTES + self._table.size(self._columns.image or "")

    def image(self, row: int) -> bytes | FilePart:
        """The image of one row: bytes, the path of a file, or Hugging Face's {bytes, path}; b"" for a null."""
        value = self._table.value(row, self._columns.image or "")
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str):
            return FilePart(os.path.join(self._root or self._table.folder(row), value))
        return value or b""

    def _blocks(self) -> Iterator[tuple[int, int]]:
        return ((start, min(start + 10_000, self._table.rows)) for start in range(0, self._table.rows, 10_000))

    def _samples(self, start: int, stop: int) -> Iterator[Sample]:
        columns = self._columns
        names = dict.fromkeys(name for name in (*columns.captions, columns.key, columns.label, columns.lang) if name)
        for row, record in enumerate(self._table.records(start, stop, list(names)), start=start):
            place = self._table.place(row)
            key = columns.key_of(record, self._table.key(row), place)
            if self._fold.keeps(key):
                captions, langs = columns.captions_of(record, place)
                yield Sample(key, TableCell(self, row), captions, langs, columns.label_of(record, place))
