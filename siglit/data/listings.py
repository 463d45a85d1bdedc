"""What listing files say: rows of key, image path, captions, languages and label, in the order of the file.

Reads csv, jsonl, COCO, Karpathy, image-folder and XM3600 listings and the headers of tars. Opens no image and knows
nothing of samples, folds or shards (`sources.py`). Whatever a person can get wrong in a listing is a `UserError` that
names file and line.
"""

import csv
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from siglit.errors import UserError
from siglit.runtime.files import MAX_LISTING_BYTES, open_regular, read_regular

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")
# Image and caption columns where none are named; the first that exists is taken. csv is open_clip's choice.
DEFAULTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "csv": (("filepath",), ("title",)),
    "jsonl": (("image", "filepath"), ("caption", "title")),
    "folder": (("file_name",), ("text", "caption")),
    "parquet": (("image",), ("caption",)),
    "hub": (("image",), ("caption",)),
}


@dataclass(frozen=True)
class Columns:
    """Which field of a record means what; None or empty: not there, or not chosen yet."""

    image: str | None = None
    captions: tuple[str, ...] = ()
    key: str | None = None
    label: str | None = None
    lang: str | None = None
    label_required: bool = True

    def resolve(self, fmt: str, names: Iterable[str], where: str) -> "Columns":
        """Fill in the defaults of `fmt`; `names` are the columns that exist, `where` opens the message.

        Raises:
            UserError: a column is missing. Captions may be, if they were not asked for and there is a label.
        """
        names = list(names)

        def missing(what: str, option: str) -> NoReturn:
            raise UserError(f"{where} has no column {what}; its columns: {', '.join(names)}. Set {option}.")

        images, captions = DEFAULTS[fmt]
        image = self.image or next((name for name in images if name in names), None)
        if image is None:
            missing(" or ".join(images), "image_column")
        chosen = self.captions or tuple(name for name in captions if name in names)[:1]
        if not chosen and self.label is None:
            missing(" or ".join(captions), "caption_column (or label_column, if there are no captions)")
        options: list[tuple[str | None, str]] = [
            (image, "image_column"),
            *((name, "caption_column") for name in chosen),
        ]
        options += [(self.key, "key_column"), (self.label, "label_column"), (self.lang, "lang_column")]
        for name, option in options:
            if name is not None and name not in names:
                missing(name, option)
        return replace(self, image=image, captions=chosen)

    def key_of(self, record: Mapping[str, Any], default: str, place: str) -> str:
        """The record's key as text; `default` where no key column is named."""
        value = record.get(self.key) if self.key else default
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            raise UserError(f"{place}: the key is {value!r}, but a key is a non-empty text or an integer")
        key = str(value)
        if not _is_unicode(key):
            raise UserError(f"{place}: the key {key!r} is not valid Unicode (half of a surrogate pair)")
        return key

    def texts_of(self, record: Mapping[str, Any], place: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The record's captions that are not blank, and their languages (none without a language column)."""
        found = [text for name in self.captions for text in _strings(record.get(name), name, place)]
        if self.lang is None:
            return tuple(_mend(text) for text in found if text.strip()), ()
        langs = _strings(record.get(self.lang), self.lang, place)
        if isinstance(record.get(self.lang), str):
            langs = langs * len(found)
        if len(langs) != len(found):
            raise UserError(f"{place}: {len(found)} captions, but {len(langs)} languages in {self.lang}; give one each")
        kept = [(_mend(text), lang) for text, lang in zip(found, langs, strict=True) if text.strip()]
        if not all(lang.strip() for _, lang in kept):
            raise UserError(f"{place}: a caption has no language in {self.lang}; give one each")
        return tuple(text for text, _ in kept), tuple(lang for _, lang in kept)

    def label_of(self, record: Mapping[str, Any], place: str) -> int | None:
        """The record's label; None without a label column."""
        value = record.get(self.label) if self.label else None
        if self.label is None or (value is None and not self.label_required):
            return None
        return parse_label(value, f"{place}: {self.label}")


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a text listing.

    `number` is where it stands in the file, for messages; `image` its path as written; `langs` one per caption or none.
    """

    number: int
    key: str
    image: str
    captions: tuple[str, ...]
    langs: tuple[str, ...] = ()
    label: int | None = None


def parse_label(value: Any, place: str) -> int:
    """An integer, or text that is one (csv, `.cls`); a UserError opening with `place` otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", value):
        return int(value)
    missing = value is None or value == "" or (isinstance(value, float) and math.isnan(value))
    raise UserError(f"{place} is {f'missing ({value!r})' if missing else repr(value)}, but a label is an integer")


def read_csv(path: Path, given: Columns, separator: str, fmt: str = "csv") -> list[Row]:
    """Rows of a csv or tsv file with a header; rows of the same image are one row with several captions."""

    def records() -> Iterator[tuple[int, dict[str, Any]]]:
        # Not strict, csv would let one unclosed quote swallow the rest of the file without a word.
        reader = csv.reader(_lines(path), delimiter=separator, strict=True)
        header: list[str] = []
        start = 1
        try:
            for cells in reader:
                line, start = start, reader.line_num + 1
                if not cells:
                    continue
                if not header:
                    header = cells
                elif len(cells) != len(header):
                    raise UserError(
                        f"{path}, line {line} has {len(cells)} cells, but the header has {len(header)}. "
                        f"Quote cells that contain {separator!r}, or set separator."
                    )
                yield line, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise UserError(
                f'{path}, line {start} is not valid csv: {error}. Close every quote; within quotes, write "" for one.'
            ) from error

    stream = records()
    # The header comes back as its own first record; that way a file without rows still has its columns checked.
    header = next(stream, (0, {}))[1]
    columns = given.resolve(fmt, header, f"{path} (separator {separator!r})") if header else given
    return _merge(path, (_row(record, columns, path, line) for line, record in stream))


def read_jsonl(path: Path, given: Columns, fmt: str = "jsonl") -> list[Row]:
    """Rows of a file with one JSON object per line; captions may be a text or a list of texts."""
    names = dict.fromkeys(name for _, record in _json_lines(path) for name in record)
    columns = given.resolve(fmt, names, str(path)) if names else given
    return _merge(path, (_row(record, columns, path, line) for line, record in _json_lines(path)))


def metadata_file(folder: Path) -> Path:
    """The listing of an image folder as Hugging Face's `imagefolder` defines it."""
    found = [path for path in (folder / "metadata.csv", folder / "metadata.jsonl") if path.is_file()]
    if len(found) != 1:
        state = "has both metadata.csv and metadata.jsonl" if found else "has no metadata.csv or metadata.jsonl"
        raise UserError(f"{folder} {state}; an image folder has one of them, with a column file_name")
    return found[0]


def read_folder(path: Path, given: Columns) -> list[Row]:
    """Rows of an image folder's metadata file."""
    return read_csv(path, given, ",", "folder") if path.suffix == ".csv" else read_jsonl(path, given, "folder")


def read_coco(path: Path) -> list[Row]:
    """Rows of a COCO captions file, one per image in file order; the key is the file name."""
    listing = _json_file(path)
    captions: dict[Any, list[str]] = {}
    rows: list[tuple[Any, Row]] = []
    try:
        for number, image in enumerate(listing["images"]):
            if image["id"] in captions:
                raise UserError(f"{path}: image {number} has the id {image['id']} of an earlier one. Remove one.")
            captions[image["id"]] = []
            rows.append((image["id"], Row(number, image["file_name"], image["file_name"], ())))
        for number, annotation in enumerate(listing["annotations"]):
            if annotation["image_id"] not in captions:
                raise UserError(f"{path}: annotation {number} is for image id {annotation['image_id']}, not in images")
            place = f"{path}, annotation {number}"
            captions[annotation["image_id"]] += _strings(annotation["caption"], "caption", place)
    except (KeyError, TypeError) as error:
        _wrong_layout(
            path, "COCO captions file", '"images": [{id, file_name}], "annotations": [{image_id, caption}]', error
        )
    return _unique(path, "image", (replace(row, captions=_clean(captions[id_])) for id_, row in rows))


def read_karpathy(path: Path, split: str | None) -> list[Row]:
    """Rows of one split of a Karpathy split file (COCO, Flickr30k); `train` includes `restval`, as is the custom."""
    wanted = {"train": ("train", "restval")}.get(split or "", (split,))
    listing = _json_file(path)
    rows = []
    try:
        for number, image in enumerate(listing["images"]):
            if image["split"] in wanted:
                name = "/".join(part for part in (image.get("filepath"), image["filename"]) if part)
                texts = [_strings(s["raw"], "raw", f"{path}, image {number}") for s in image["sentences"]]
                rows.append(Row(number, name, name, _clean(text for found in texts for text in found)))
        splits = sorted({image["split"] for image in listing["images"]})
    except (KeyError, TypeError, AttributeError) as error:
        _wrong_layout(path, "Karpathy split file", '"images": [{filename, split, sentences: [{raw}]}]', error)
    if not rows and splits:
        raise UserError(f"{path} has no split {split}; its splits: {', '.join(splits)}. Set split.")
    return _unique(path, "image", rows)


def read_xm3600(path: Path, images: Path) -> list[Row]:
    """Rows of Crossmodal-3600's captions.jsonl, the captions of all languages side by side.

    The listing names no files: the image is `<key>.<extension>` in `images`, `.jpg` (the original's) if none is there.
    """
    present = set(os.listdir(images)) if images.is_dir() else set()
    rows = []
    for line, record in _json_lines(path):
        place = f"{path}, line {line}"
        key = Columns(key="image/key").key_of(record, "", place)
        names = [f"{key}.{extension}" for extension in IMAGE_EXTENSIONS]
        texts: list[tuple[str, str]] = []
        for lang, entry in record.items():
            if isinstance(entry, dict):
                texts += [(text, lang) for text in _clean(_strings(entry.get("caption"), lang, place))]
        name = next((name for name in names if name in present), names[0])
        rows.append(Row(line, key, name, tuple(text for text, _ in texts), tuple(lang for _, lang in texts)))
    return _unique(path, "line", rows)


@dataclass(frozen=True)
class Member:
    """One file of a tar: `offset` and `size` in bytes; `name` is for messages only, never a path."""

    name: str
    offset: int
    size: int


def index_tar(path: Path) -> dict[str, dict[str, Member]]:
    """Where the members of an uncompressed tar lie: {key: {extension: Member}}, in the order of the file.

    As in webdataset, a key is the name up to the first dot of its last part, and the extension the rest in lower case.

    Raises:
        UserError: compressed, torn or no tar; or a key has the same extension, or two images, twice.
    """
    groups: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, _, base = info.name.removeprefix("./").rpartition("/")
                stem, _, extension = base.partition(".")
                if info.isreg() and stem and extension:
                    key = f"{folder}/{stem}" if folder else stem
                    member = Member(info.name, info.offset_data, info.size)
                    _add_member(path, key, groups.setdefault(key, {}), extension.lower(), member)
            end = tar.offset
        # tarfile takes a broken header in the middle, or a cut between two members, for the end of the archive.
        if read_part(path, end, 512).strip(b"\0") or path.stat().st_size < end + 512:
            raise tarfile.ReadError(f"no end-of-archive mark at byte {end}")
    except tarfile.TarError as error:
        magic = read_part(path, 0, 6)
        packed = any(magic.startswith(start) for start in (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
        state = "is compressed; images need byte offsets, so unpack it (gunzip, unzstd, …)"
        raise UserError(f"{path} {state if packed else f'is torn, or no tar: {error}. Fetch it again'}") from error
    return groups


def read_part(path: Path | str, offset: int, size: int) -> bytes:
    """Up to `size` bytes of a file from `offset` on."""
    with open_regular(path) as file:
        file.seek(offset)
        return file.read(size)


def json_object(text: str, place: str) -> dict[str, Any]:
    """Parse one JSON object; a UserError opening with `place` if it is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{place} is a JSON {type(value).__name__}, but an object {{…}} is wanted")
    return value


def decode_text(data: bytes, place: str, offset: int = 0) -> str:
    """UTF-8 to text; the UserError opens with `place` and counts bytes from `offset`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = data[error.start]
        raise UserError(
            f"{place} is not UTF-8 at byte {offset + error.start} (0x{bad:02x}). Convert the file (iconv -t utf-8)."
        ) from error


def _add_member(path: Path, key: str, group: dict[str, Member], extension: str, member: Member) -> None:
    other = group.get(extension)
    if other is None and extension in IMAGE_EXTENSIONS:
        other = next((group[name] for name in group if name in IMAGE_EXTENSIONS), None)
    if other is not None:
        places = f"{other.name} at byte {other.offset} and {member.name} at byte {member.offset}"
        raise UserError(f"{path}: the key {key} occurs twice: {places}. Keys must be unique; write the tar anew.")
    group[extension] = member


def _row(record: Mapping[str, Any], columns: Columns, path: Path, line: int) -> Row:
    place = f"{path}, line {line}"
    image = record.get(columns.image or "")
    if not isinstance(image, str) or not image.strip():
        raise UserError(f"{place}: {columns.image} is {image!r}, but the path of an image is wanted")
    captions, langs = columns.texts_of(record, place)
    return Row(line, columns.key_of(record, image, place), image, captions, langs, columns.label_of(record, place))


def _merge(path: Path, rows: Iterable[Row]) -> list[Row]:
    """Join the rows of one image, in the place of its first."""
    merged: dict[str, Row] = {}
    for row in rows:
        first = merged.setdefault(row.key, row)
        if first is row:
            continue
        places = f"line {first.number} and line {row.number} of {path}"
        if first.image != row.image:
            raise UserError(f"the key {row.key} stands for two images, on {places}. Make it unique, or set key_column.")
        if first.label != row.label:
            raise UserError(f"{row.image} has labels {first.label} and {row.label}, on {places}. Give it one label.")
        captions, langs = first.captions + row.captions, first.langs + row.langs
        merged[row.key] = replace(first, captions=captions, langs=langs)
    return list(merged.values())


def _unique(path: Path, noun: str, rows: Iterable[Row]) -> list[Row]:
    found: dict[str, Row] = {}
    for row in rows:
        first = found.setdefault(row.key, row)
        if first is not row:
            places = f"{noun} {first.number} and {noun} {row.number} of {path}"
            raise UserError(f"the key {row.key} occurs twice: {places}. Keys must be unique; remove one.")
    return list(found.values())


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, a byte order mark allowed; decoded one by one so that a bad byte has a line number."""
    offset = 0
    try:
        # Read at once, as the rows are kept anyway: whoever stops at a bad line leaves no file open.
        data = read_regular(path, MAX_LISTING_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Correct path.") from error
    for number, line in enumerate(io.BytesIO(data), start=1):
        text = decode_text(line, f"{path}, line {number}", offset)
        offset += len(line)
        yield text.removeprefix("\ufeff") if number == 1 else text


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield number, json_object(line, f"{path}, line {number}")


def _json_file(path: Path) -> dict[str, Any]:
    return json_object("".join(_lines(path)), str(path))


def _wrong_layout(path: Path, what: str, layout: str, error: Exception) -> NoReturn:
    raise UserError(f"{path} is not a {what}, {{{layout}}}: {type(error).__name__} {error}. Check format.") from error


def _strings(value: Any, name: str, place: str) -> list[str]:
    """A text, a list of texts or nothing, as a list; a null within a list becomes "", so that lists stay parallel."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(text is not None and not isinstance(text, str) for text in values):
        raise UserError(f"{place}: {name} is {value!r:.80}, but a text or a list of texts is wanted")
    return [text or "" for text in values]


def _clean(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(_mend(text) for text in texts if text.strip())


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _mend(text: str) -> str:
    """Replace halves of surrogate pairs (JSON of captions cut inside an emoji), which UTF-8 cannot store."""
    return text if _is_unicode(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
