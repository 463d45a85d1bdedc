"""Sources whose listing is read into memory: csv, jsonl, coco, karpathy, folder, class_folders and xm3600.

Knows which file a path means and how rows become samples; `listings.py` and `class_folders.py` read the files.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from siglit.config import SourceSpec
from siglit.data.sources import class_folders, listings
from siglit.data.sources.listings import Row
from siglit.data.sources.options import Fold, columns_of, identity_of, separator_of
from siglit.data.sources.samples import SAMPLE_BYTES, FilePart, Sample, Source, Unit, row_units
from siglit.errors import UserError
from siglit.runtime.files import file_hash
from siglit.runtime.paths import expand


def listing_file(spec: SourceSpec) -> Path:
    """The file that the path of a listing source means; of class_folders, the folder.

    Raises:
        UserError: there is no such file.
    """
    path = Path(expand(spec.path, "path"))
    if spec.format == "xm3600" and path.is_dir():
        path /= "captions.jsonl"
    if not path.exists():
        raise UserError(f"there is no {path} (format {spec.format}). Check the path.")
    if spec.format == "class_folders" and not path.is_dir():
        raise UserError(
            f"{path} is a file, but class_folders expects a folder with one folder per class. Check the path."
        )
    return listings.metadata_file(path) if spec.format == "folder" else path


def listing_identity(spec: SourceSpec, path: Path) -> dict[str, Any]:
    """The identity of a listing source: the hash of its listing; of class_folders, that of its names.

    Raises:
        UserError: the listing cannot be read.
    """
    if spec.format == "class_folders":
        return identity_of(spec, []) | class_folders.identity(path)
    try:
        digest = file_hash(path, "sha256")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    return identity_of(spec, [path]) | {"sha256": digest}


class ListingSource(Source):
    """A listing in memory, each image a file of its own."""

    def __init__(self, spec: SourceSpec) -> None:
        """Read the listing.

        Raises:
            UserError: it is missing, empty or malformed; a column is missing; a key occurs twice.
        """
        path = listing_file(spec)
        images = Path(expand(spec.images, "images")) if spec.images else path.parent
        rows: list[Row]
        if spec.format == "csv":
            rows = listings.read_csv(path, columns_of(spec), separator_of(spec, path))
        elif spec.format == "jsonl":
            rows = listings.read_jsonl(path, columns_of(spec))
        elif spec.format == "coco":
            rows = listings.read_coco(path)
        elif spec.format == "karpathy":
            rows = listings.read_karpathy(path, spec.split)
        elif spec.format == "folder":
            rows = listings.read_folder(path, columns_of(spec))
        elif spec.format == "class_folders":
            images = path
            _, rows = class_folders.read(path)
        else:
            images = images if spec.images else images / "images"
            rows = listings.read_xm3600(path, images)
        if len(rows) == 0:
            raise UserError(f"{path} has no samples")
        self.name = f"{spec.format} {spec.path}"
        self._spec, self._path, self._root, self._rows, self._fold = spec, path, str(images), rows, Fold(spec.fold)

    @override
    def identity(self) -> dict[str, Any]:
        return listing_identity(self._spec, self._path)

    @override
    def units(self, shard_size: int) -> list[Unit]:
        return row_units(len(self._rows), shard_size, self._path.name)

    @override
    def load(self, unit: Unit) -> Sequence[Sample]:
        return [self._sample(row) for row in self._rows[unit.start : unit.stop] if self._fold.keeps(row.key)]

    @override
    def captions(self) -> Iterator[tuple[str, ...]]:
        return (row.captions for row in self._rows if self._fold.keeps(row.key))

    @override
    def memory(self) -> int:
        return len(self._rows) * SAMPLE_BYTES

    def _sample(self, row: Row) -> Sample:
        return Sample(row.key, FilePart(os.path.join(self._root, row.image)), row.captions, row.langs, row.label)
