"""Samples in tars as img2dataset writes them (webdataset).

Knows which members make a sample; `tars.py` reads the headers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from siglit.config import SourceSpec
from siglit.data.decode_image import IMAGE_EXTENSIONS
from siglit.data.sources.columns import parse_label
from siglit.data.sources.options import Fold, columns_of, identity_of
from siglit.data.sources.samples import SAMPLE_BYTES, FilePart, Sample, Source, Unit, check_unique, read_part
from siglit.data.sources.tars import Member, index_tar
from siglit.data.sources.texts import decode_text, json_object
from siglit.errors import UserError
from siglit.runtime.files import MAX_BYTES, check_size
from siglit.runtime.paths import files_of


class TarSource(Source):
    """One unit per tar; its headers are read when the unit is loaded, and no image before a sample's bytes are read.

    Keys are checked within each tar: a check across tars would have to read the headers of all of them first.
    """

    def __init__(self, spec: SourceSpec) -> None:
        """List the tars.

        Raises:
            UserError: there are none.
        """
        self.name = f"webdataset {spec.path}"
        self._spec, self._fold, self._paths = spec, Fold(spec.fold), files_of(spec.path, ".tar")
        captions = columns_of(spec).captions
        self._columns = replace(columns_of(spec), captions=captions or ("caption",))
        self._needs_json = bool(captions or spec.key_column or spec.label_column or spec.lang_column)

    @override
    def identity(self) -> dict[str, Any]:
        return identity_of(self._spec, self._paths)

    @override
    def units(self, shard_size: int) -> list[Unit]:
        return [Unit(number, path.name, 0, 0) for number, path in enumerate(self._paths)]

    @override
    def load(self, unit: Unit) -> Sequence[Sample]:
        path = self._paths[unit.number]
        try:
            samples = [self._sample(path, key, group) for key, group in index_tar(path).items()]
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if self._spec.key_column:
            check_unique([sample.key for sample in samples], lambda i: f"sample {i} of {path}")
        return [sample for sample in samples if self._fold.keeps(sample.key)]

    @override
    def captions(self) -> Iterator[tuple[str, ...]]:
        return (sample.captions for unit in self.units(1) for sample in self.load(unit))

    @override
    def memory(self) -> int:
        # As if all tars were filled like the first: counting their samples means reading every header.
        sizes = [path.stat().st_size for path in self._paths]
        return len(self.load(self.units(1)[0])) * SAMPLE_BYTES * sum(sizes) // max(1, sizes[0])

    def _sample(self, path: Path, key: str, group: dict[str, Member]) -> Sample:
        def text(extension: str) -> str:
            member = group[extension]
            check_size(member.size, MAX_BYTES, path)
            data = read_part(path, member.offset, member.size)
            return decode_text(data, f"{path}, {member.name}", member.offset)

        place = f"{path}, sample {key}"
        plain = "txt" in group and not self._needs_json
        record = json_object(text("json"), f"{place}: .json") if "json" in group and not plain else {}
        if "txt" in group and self._spec.caption_column is None:
            record["caption"] = text("txt")
        captions, langs = self._columns.captions_of(record, place)
        label = self._columns.label_of(record, place)
        if self._spec.label_column is None and "cls" in group:
            label = parse_label(text("cls"), f"{place}: .cls")
        member = next((group[name] for name in group if name in IMAGE_EXTENSIONS), None)
        image = b"" if member is None else FilePart(str(path), member.offset, member.size)
        return Sample(self._columns.key_of(record, key, place), image, captions, langs, label)
