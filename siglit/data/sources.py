"""From a data set on disk to samples: key, image bytes, captions, languages, label.

Knows which files a path means, which rows a fold keeps, and how the rows of every format become samples in a fixed
order, cut into units of work. Decodes no image; knows nothing of YAML, towers or caches. `listings.py` reads the text
formats.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, get_args

from siglit.config import Format, SourceSpec
from siglit.data import class_folders, listings
from siglit.data.listings import IMAGE_EXTENSIONS, Columns, Row
from siglit.data.tables import HubTable, ParquetTable, Table
from siglit.errors import UserError
from siglit.runtime.files import MAX_BYTES, check_size, file_hash, read_regular
from siglit.runtime.paths import expand, files_of

_SAMPLE_BYTES = 400
"""What a sample takes in memory without its image; measured with one caption of 60 letters: csv 230, tars 390."""
_TEXT_OPTIONS = ("caption_column", "key_column", "label_column", "lang_column")
# Options each format reads; any other is refused, as one that is silently ignored looks like one that worked.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "csv": ("images", "image_column", "separator", *_TEXT_OPTIONS),
    "jsonl": ("images", "image_column", *_TEXT_OPTIONS),
    "folder": ("image_column", *_TEXT_OPTIONS),
    "class_folders": (),
    "coco": ("images",),
    "karpathy": ("images", "split"),
    "xm3600": ("images",),
    "parquet": ("images", "image_column", *_TEXT_OPTIONS),
    "hub": ("images", "image_column", "split", *_TEXT_OPTIONS),
    "webdataset": _TEXT_OPTIONS,
}


@dataclass(frozen=True, slots=True)
class FilePart:
    """An image that lies in a file, or in `size` bytes of one from `offset` on (a member of a tar)."""

    path: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes.

        Raises:
            OSError: the file is missing, unreadable, not a regular one, or ends before the part does; or there are more
                than 1 GiB.
        """
        if self.size is None:
            return read_regular(self.path)
        check_size(self.size, MAX_BYTES, self.path)
        data = listings.read_part(self.path, self.offset, self.size)
        if len(data) < self.size:
            raise OSError(f"{self.path} ends after {len(data)} of the {self.size} bytes from byte {self.offset}")
        return data


@dataclass(frozen=True, slots=True)
class Cell:
    """An image that lies in a row of a table; looking it up reads its row group, unless that was the last one read."""

    source: "_TableSource"
    row: int

    def look_up(self) -> bytes | FilePart:
        """What the row holds."""
        return self.source.image(self.row)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and what is said about it; `langs` has one entry per caption, or none."""

    key: str
    image: bytes | FilePart | Cell
    captions: tuple[str, ...]
    langs: tuple[str, ...] = ()
    label: int | None = None

    def image_bytes(self) -> bytes:
        """The image file's content, b"" where the source holds none; OSError if its file cannot be read."""
        image = self.image.look_up() if isinstance(self.image, Cell) else self.image
        return image.read() if isinstance(image, FilePart) else image

    def carried(self) -> "Sample":
        """The same, with an image that any process can read without the source: its bytes, or its place in a file."""
        return replace(self, image=self.image.look_up()) if isinstance(self.image, Cell) else self


@dataclass(frozen=True)
class Unit:
    """One shard's worth of work: rows start … stop - 1 of a source before folding, or one tar (start = stop = 0)."""

    number: int
    name: str
    start: int
    stop: int


class Source(Protocol):
    """A data set in a fixed order; every process that opens the same spec sees the same units and samples."""

    name: str

    def identity(self) -> dict[str, Any]:
        """What decides the samples, JSON-able and the same on every machine; enters the cache's fingerprint."""

    def units(self, shard_size: int) -> list[Unit]:
        """The work in pieces of `shard_size` rows before folding; tars: one unit per file."""

    def load(self, unit: Unit) -> Sequence[Sample]:
        """The samples of one unit that the fold keeps; no image is read.

        Raises:
            UserError: what was not checked at opening is wrong (a tar, a label); the message names the place.
        """

    def captions(self) -> Iterator[tuple[str, ...]]:
        """The captions of every sample in order, without reading images."""

    def memory(self) -> int:
        """About how many bytes all samples take in memory when carried; reads no more than headers."""


def open_source(spec: SourceSpec) -> Source:
    """Open a data set: find its files, read its listing, check its columns and keys. Images are not looked at.

    Raises:
        UserError: an unknown format or option, a missing or empty listing, a missing column, a duplicate key, …
    """
    if spec.format not in get_args(Format):
        raise UserError(f"unknown source format {spec.format!r}; formats: {', '.join(get_args(Format))}")
    for option in ("images", "image_column", *_TEXT_OPTIONS, "separator", "split"):
        if getattr(spec, option) is not None and option not in _OPTIONS[spec.format]:
            known = ", ".join((*_OPTIONS[spec.format], "fold"))
            raise UserError(f"{option} is not an option of source format {spec.format}; remove it. Options: {known}")
    if "split" in _OPTIONS[spec.format] and spec.split is None:
        raise UserError(f"source format {spec.format} needs split (such as train, val, test)")
    if spec.format == "webdataset":
        return _TarSource(spec)
    if spec.format in ("parquet", "hub"):
        return _TableSource(spec)
    return _ListingSource(spec)


def source_identity(spec: SourceSpec) -> dict[str, Any] | None:
    """What `open_source(spec).identity()` gives, without reading a listing; None for the Hub, which would be asked.

    Raises:
        UserError: there are no such files.
    """
    if spec.format == "hub":
        return None
    if spec.format in ("parquet", "webdataset"):
        return _identity(spec, files_of(spec.path, ".tar" if spec.format == "webdataset" else ".parquet"))
    return _listing_identity(spec, _listing_file(spec))


def _listing_file(spec: SourceSpec) -> Path:
    path = Path(expand(spec.path, "path"))
    if spec.format == "xm3600" and path.is_dir():
        path /= "captions.jsonl"
    if not path.exists():
        raise UserError(f"there is no {path} (format {spec.format}). Correct path.")
    if spec.format == "class_folders" and not path.is_dir():
        raise UserError(f"{path} is a file, but class_folders wants a folder with one folder per class. Correct path.")
    return listings.metadata_file(path) if spec.format == "folder" else path


def _listing_identity(spec: SourceSpec, path: Path) -> dict[str, Any]:
    if spec.format == "class_folders":
        return _identity(spec, []) | class_folders.identity(path)
    try:
        digest = file_hash(path, "sha256")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Correct path.") from error
    return _identity(spec, [path]) | {"sha256": digest}


class _Fold:
    """The share of keys to keep; sha256, so that a key falls on the same side in every process and version."""

    def __init__(self, text: str | None) -> None:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?/(\d+)", "0/1" if text is None else text)
        low, high, self.parts = (int(part or match[1]) for part in match.groups()) if match else (1, 0, 0)
        if not low <= high < self.parts:
            raise UserError(f"fold is {text!r}; wanted FIRST-LAST/PARTS with LAST < PARTS, such as 0-8/10 or 9/10")
        self.kept = range(low, high + 1)

    def keeps(self, key: str) -> bool:
        return self.parts == 1 or int.from_bytes(hashlib.sha256(key.encode()).digest()) % self.parts in self.kept


class _ListingSource:
    """csv, jsonl, coco, karpathy, folder, class_folders, xm3600: a listing in memory, each image a file of its own."""

    def __init__(self, spec: SourceSpec) -> None:
        path = _listing_file(spec)
        images = Path(expand(spec.images, "images")) if spec.images else path.parent
        rows: list[Row]
        if spec.format == "csv":
            rows = listings.read_csv(path, _columns(spec), _separator(spec, path))
        elif spec.format == "jsonl":
            rows = listings.read_jsonl(path, _columns(spec))
        elif spec.format == "coco":
            rows = listings.read_coco(path)
        elif spec.format == "karpathy":
            rows = listings.read_karpathy(path, spec.split)
        elif spec.format == "folder":
            rows = listings.read_folder(path, _columns(spec))
        elif spec.format == "class_folders":
            images = path
            _, rows = class_folders.read(path)
        else:
            images = images if spec.images else images / "images"
            rows = listings.read_xm3600(path, images)
        if not rows:
            raise UserError(f"{path} has no samples")
        self.name = f"{spec.format} {spec.path}"
        self._spec, self._path, self._root, self._rows, self._fold = spec, path, str(images), rows, _Fold(spec.fold)

    def identity(self) -> dict[str, Any]:
        return _listing_identity(self._spec, self._path)

    def units(self, shard_size: int) -> list[Unit]:
        return _ranges(len(self._rows), shard_size, self._path.name)

    def load(self, unit: Unit) -> Sequence[Sample]:
        return [self._sample(row) for row in self._rows[unit.start : unit.stop] if self._fold.keeps(row.key)]

    def captions(self) -> Iterator[tuple[str, ...]]:
        return (row.captions for row in self._rows if self._fold.keeps(row.key))

    def memory(self) -> int:
        return len(self._rows) * _SAMPLE_BYTES

    def _sample(self, row: Row) -> Sample:
        return Sample(row.key, FilePart(os.path.join(self._root, row.image)), row.captions, row.langs, row.label)


class _TarSource:
    """Tars as img2dataset writes them; headers are read when a tar's unit is loaded, images only when asked for.

    Keys are checked within each tar: a check across tars would have to read the headers of all of them first.
    """

    def __init__(self, spec: SourceSpec) -> None:
        self.name = f"webdataset {spec.path}"
        self._spec, self._fold, self._paths = spec, _Fold(spec.fold), files_of(spec.path, ".tar")
        captions = _columns(spec).captions
        self._columns = replace(_columns(spec), captions=captions or ("caption",))
        self._needs_json = bool(captions or spec.key_column or spec.label_column or spec.lang_column)

    def identity(self) -> dict[str, Any]:
        return _identity(self._spec, self._paths)

    def units(self, shard_size: int) -> list[Unit]:
        return [Unit(number, path.name, 0, 0) for number, path in enumerate(self._paths)]

    def load(self, unit: Unit) -> Sequence[Sample]:
        path = self._paths[unit.number]
        try:
            samples = [self._sample(path, key, group) for key, group in listings.index_tar(path).items()]
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if self._spec.key_column:
            _check_unique([sample.key for sample in samples], lambda i: f"sample {i} of {path}")
        return [sample for sample in samples if self._fold.keeps(sample.key)]

    def captions(self) -> Iterator[tuple[str, ...]]:
        return (sample.captions for unit in self.units(1) for sample in self.load(unit))

    def memory(self) -> int:
        # As if all tars were filled like the first: counting their samples means reading every header.
        sizes = [path.stat().st_size for path in self._paths]
        return len(self.load(self.units(1)[0])) * _SAMPLE_BYTES * sum(sizes) // max(1, sizes[0])

    def _sample(self, path: Path, key: str, group: dict[str, listings.Member]) -> Sample:
        def text(extension: str) -> str:
            member = group[extension]
            check_size(member.size, MAX_BYTES, path)
            return listings.decode_text(
                listings.read_part(path, member.offset, member.size), f"{path}, {member.name}", member.offset
            )

        place = f"{path}, sample {key}"
        plain = "txt" in group and not self._needs_json
        record = listings.json_object(text("json"), f"{place}: .json") if "json" in group and not plain else {}
        if "txt" in group and self._spec.caption_column is None:
            record["caption"] = text("txt")
        captions, langs = self._columns.texts_of(record, place)
        label = self._columns.label_of(record, place)
        if self._spec.label_column is None and "cls" in group:
            label = listings.parse_label(text("cls"), f"{place}: .cls")
        found = next((group[name] for name in group if name in IMAGE_EXTENSIONS), None)
        image = FilePart(str(path), found.offset, found.size) if found else b""
        return Sample(self._columns.key_of(record, key, place), image, captions, langs, label)


class _TableSource:
    """parquet and hub: columns in row groups; a unit is a range of the rows of all files, numbered through."""

    def __init__(self, spec: SourceSpec) -> None:
        self.name = f"{spec.format} {spec.path}"
        self._spec, self._fold = spec, _Fold(spec.fold)
        self._paths = files_of(spec.path, ".parquet") if spec.format == "parquet" else []
        self._table: Table = (
            ParquetTable(self._paths) if self._paths else HubTable(expand(spec.path, "path"), str(spec.split))
        )
        if not self._table.rows:
            raise UserError(f"{self.name} has no samples")
        columns = _columns(spec)
        if columns.label is None and "label" in self._table.names and self._table.is_integer("label"):
            columns = replace(columns, label="label", label_required=False)
        self._columns = columns.resolve(spec.format, self._table.names, self.name)
        assert self._columns.image is not None
        self._table.check_image(self._columns.image)
        self._root = expand(spec.images, "images") if spec.images else None
        key = self._columns.key
        if key is not None:
            found = (self._table.records(start, stop, [key]) for start, stop in self._blocks())
            _check_unique([record[key] for block in found for record in block], self._table.place)

    def identity(self) -> dict[str, Any]:
        extra = self._table.identity() if isinstance(self._table, HubTable) else {}
        return _identity(self._spec, self._paths) | extra

    def units(self, shard_size: int) -> list[Unit]:
        return _ranges(self._table.rows, shard_size, self.name)

    def load(self, unit: Unit) -> Sequence[Sample]:
        return list(self._samples(unit.start, unit.stop))

    def captions(self) -> Iterator[tuple[str, ...]]:
        return (sample.captions for start, stop in self._blocks() for sample in self._samples(start, stop))

    def memory(self) -> int:
        return self._table.rows * _SAMPLE_BYTES + self._table.size(self._columns.image or "")

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
        wanted = dict.fromkeys(name for name in (*columns.captions, columns.key, columns.label, columns.lang) if name)
        for row, record in enumerate(self._table.records(start, stop, list(wanted)), start=start):
            place = self._table.place(row)
            key = columns.key_of(record, self._table.key(row), place)
            if self._fold.keeps(key):
                texts = columns.texts_of(record, place)
                yield Sample(key, Cell(self, row), *texts, columns.label_of(record, place))


def _columns(spec: SourceSpec) -> Columns:
    captions = tuple(name.strip() for name in (spec.caption_column or "").split(",") if name.strip())
    return Columns(spec.image_column, captions, spec.key_column, spec.label_column, spec.lang_column)


def _separator(spec: SourceSpec, path: Path) -> str:
    # YAML keeps the two characters of an unquoted \t.
    separator = {None: "," if path.suffix == ".csv" else "\t", r"\t": "\t"}.get(spec.separator, spec.separator) or ""
    if len(separator) != 1:
        raise UserError(f"separator is {spec.separator!r}, but it is one character, such as ',' or '\\t'")
    return separator


def _ranges(rows: int, shard_size: int, name: str) -> list[Unit]:
    assert shard_size > 0
    starts = range(0, rows, shard_size)
    return [
        Unit(
            number,
            f"samples {start}-{min(start + shard_size, rows) - 1} of {name}",
            start,
            min(start + shard_size, rows),
        )
        for number, start in enumerate(starts)
    ]


def _identity(spec: SourceSpec, paths: Iterable[Path]) -> dict[str, Any]:
    """Format, files and the options as given: `images` says where files lie on this machine, so it stays out."""
    names = ("image_column", *_TEXT_OPTIONS, "separator", "split", "fold")
    options = {name: getattr(spec, name) for name in names if getattr(spec, name) is not None}
    files = sorted([path.name, path.stat().st_size] for path in paths)
    return {"format": spec.format, "files": files, "options": options}


def _check_unique(keys: Sequence[Any], place: Callable[[int], str]) -> None:
    if len(set(keys)) == len(keys):
        return
    first: dict[Any, int] = {}
    for i, key in enumerate(keys):
        if key in first:
            raise UserError(
                f"the key {key!r} occurs twice: {place(first[key])} and {place(i)}. Make it unique, or choose another "
                "key_column."
            )
        first[key] = i
