"""Samples of a data set, units of work, and what every source offers.

Knows how an image is read from its place; does not know formats (`listing_source.py`, `tar_source.py`,
`table_source.py`) and decodes no image.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from siglit.errors import UserError
from siglit.runtime.files import MAX_BYTES, check_size, open_regular, read_regular

SAMPLE_BYTES = 400
"""Memory of a sample without its image; measured with one caption of 60 letters: csv 230, tars 390."""


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
        data = read_part(self.path, self.offset, self.size)
        if len(data) < self.size:
            raise OSError(f"{self.path} ends after {len(data)} of the {self.size} bytes from byte {self.offset}")
        return data


class ImageTable(Protocol):
    """A table with an image in each row."""

    def image(self, row: int) -> bytes | FilePart:
        """The image of one row."""


@dataclass(frozen=True, slots=True)
class TableCell:
    """An image that lies in a row of a table; looking it up reads its row group, unless that was the last one read."""

    table: ImageTable
    row: int

    def look_up(self) -> bytes | FilePart:
        """What the row holds."""
        return self.table.image(self.row)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its annotation; `langs` has one entry per caption, or none."""

    key: str
    image: bytes | FilePart | TableCell
    captions: tuple[str, ...]
    langs: tuple[str, ...] = ()
    label: int | None = None

    @property
    def has_annotation(self) -> bool:
        """Whether there is a caption or a label."""
        return len(self.captions) > 0 or self.label is not None

    def image_bytes(self) -> bytes:
        """The content of the image file, b"" where the source holds none.

        Raises:
            OSError: the image file cannot be read.
        """
        image = self.image.look_up() if isinstance(self.image, TableCell) else self.image
        return image.read() if isinstance(image, FilePart) else image

    def detached(self) -> "Sample":
        """The same, with an image that any process can read without the source: its bytes, or its place in a file."""
        return replace(self, image=self.image.look_up()) if isinstance(self.image, TableCell) else self


@dataclass(frozen=True)
class Unit:
    """The samples of one shard: rows start … stop - 1 of a source before folding, or one tar (start = stop = 0)."""

    number: int
    name: str
    start: int
    stop: int


class Source(Protocol):
    """A data set in a fixed order; every process that opens the same spec sees the same units and samples."""

    name: str

    def identity(self) -> dict[str, Any]:
        """What decides the samples, JSON-able and the same on every machine; part of the cache's fingerprint."""

    def units(self, shard_size: int) -> list[Unit]:
        """Units of `shard_size` rows before folding; of tars, one unit per file."""

    def load(self, unit: Unit) -> Sequence[Sample]:
        """The samples of one unit that the fold keeps; no image is read.

        Raises:
            UserError: a tar, key, caption or label is invalid that was not checked at opening; the message names the
                place.
        """

    def captions(self) -> Iterator[tuple[str, ...]]:
        """The captions of every sample in order, without reading images."""

    def memory(self) -> int:
        """About how many bytes all detached samples take in memory; reads no more than headers."""


def read_part(path: Path | str, offset: int, size: int) -> bytes:
    """Up to `size` bytes of a file from `offset` on."""
    with open_regular(path) as file:
        file.seek(offset)
        return file.read(size)


def row_units(rows: int, size: int, name: str) -> list[Unit]:
    """Cut `rows` rows into units of `size`; `name` is what they are rows of."""
    assert size > 0
    stops = [min(start + size, rows) for start in range(0, rows, size)]
    return [
        Unit(number, f"samples {number * size}-{stop - 1} of {name}", number * size, stop)
        for number, stop in enumerate(stops)
    ]


def check_unique(keys: Sequence[Any], place: Callable[[int], str]) -> None:
    """Compare keys; `place` says in words where number i is.

    Raises:
        UserError: two keys are equal, or a key is a list or a mapping.
    """
    try:
        if len(set(keys)) == len(keys):
            return
    except TypeError as error:
        i = next(i for i, key in enumerate(keys) if isinstance(key, (list, dict)))
        raise UserError(
            f"{place(i)}: the key is {keys[i]!r:.80}, expected a non-empty text or an integer. Choose another "
            "key_column."
        ) from error
    first: dict[Any, int] = {}
    for i, key in enumerate(keys):
        if key in first:
            raise UserError(
                f"the key {key!r} occurs twice: {place(first[key])} and {place(i)}. Keys must be unique; rename one, "
                "or choose another key_column."
            )
        first[key] = i
