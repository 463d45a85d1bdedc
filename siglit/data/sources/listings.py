"""Reads text listings: rows of key, image path, captions, languages and label, in the order of the file.

csv, jsonl, COCO, Karpathy, image-folder and XM3600. Opens no image and knows nothing of samples, folds or shards
(`listing_source.py`). Whatever a person can get wrong in a listing is a `UserError` that names file and line.
"""

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from siglit.data.decode_image import IMAGE_EXTENSIONS
from siglit.data.sources.columns import Columns, not_blank, string_list
from siglit.data.sources.texts import decode_text, json_object
from siglit.errors import UserError
from siglit.runtime.files import MAX_LISTING_BYTES, read_regular
from siglit.runtime.text import plural


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a text listing.

    `number` is its line or place in the file, for messages; `image` its path as written; `langs` one per caption, or
    none.
    """

    number: int
    key: str
    image: str
    captions: tuple[str, ...]
    langs: tuple[str, ...] = ()
    label: int | None = None


def read_csv(path: Path, columns: Columns, separator: str, fmt: str = "csv") -> list[Row]:
    """Read a csv or tsv file with a header; lines of the same image are one row with several captions.

    Raises:
        UserError: the file is not csv, a column is missing, or lines of one image contradict each other.
    """

    def records() -> Iterator[tuple[int, dict[str, Any]]]:
        # Not strict, csv would let one unclosed quote swallow the rest of the file without a word.
        reader = csv.reader(_lines(path), delimiter=separator, strict=True)
        header: list[str] = []
        start = 1
        try:
            for cells in reader:
                line, start = start, reader.line_num + 1
                if len(cells) == 0:
                    continue
                if len(header) == 0:
                    header = cells
                elif len(cells) != len(header):
                    raise UserError(
                        f"{path}, line {line} has {plural(len(cells), 'cell')}, but the header has {len(header)}. "
                        f"Quote cells that contain {separator!r}, or set separator."
                    )
                yield line, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            if "universal-newline" in str(error):
                raise UserError(
                    f"{path}, line {start} holds a carriage return without a line feed (line ends of old programs). "
                    "Convert the line ends (tr '\\r' '\\n'), or quote the cell."
                ) from error
            raise UserError(
                f'{path}, line {start} is not valid csv: {error}. Close every quote; within quotes, write "" for one.'
            ) from error

    stream = records()
    # The header comes back as its own first record; that way a file without rows still has its columns checked.
    header = next(stream, (0, {}))[1]
    if len(header) > 0:
        columns = columns.resolve(fmt, header, f"{path} (separator {separator!r})")
    return _merge(path, (_row(record, columns, path, line) for line, record in stream))


def read_jsonl(path: Path, columns: Columns, fmt: str = "jsonl") -> list[Row]:
    """Read a file with one JSON object per line; captions may be a text or a list of texts.

    Raises:
        UserError: a line is not a JSON object, a column is missing, or lines of one image contradict each other.
    """
    names = dict.fromkeys(name for _, record in _json_lines(path) for name in record)
    if len(names) > 0:
        columns = columns.resolve(fmt, names, str(path))
    return _merge(path, (_row(record, columns, path, line) for line, record in _json_lines(path)))


def metadata_file(folder: Path) -> Path:
    """The listing of an image folder as Hugging Face's `imagefolder` defines it.

    Raises:
        UserError: the folder has no metadata.csv or metadata.jsonl, or has both.
    """
    paths = [path for path in (folder / "metadata.csv", folder / "metadata.jsonl") if path.is_file()]
    if len(paths) != 1:
        state = (
            "has both metadata.csv and metadata.jsonl" if len(paths) == 2 else "has no metadata.csv or metadata.jsonl"
        )
        raise UserError(f"{folder} {state}; expected one of them, with a column file_name")
    return paths[0]


def read_folder(path: Path, columns: Columns) -> list[Row]:
    """Read an image folder's metadata file, as `read_csv` or `read_jsonl`."""
    return read_csv(path, columns, ",", "folder") if path.suffix == ".csv" else read_jsonl(path, columns, "folder")


def read_coco(path: Path) -> list[Row]:
    """Read a COCO captions file, one row per image in file order; the key is the file name.

    Raises:
        UserError: the file has another layout, or an image id or file name occurs twice.
    """
    listing = _json_file(path)
    captions: dict[Any, list[str]] = {}
    rows: list[tuple[Any, Row]] = []
    try:
        for number, image in enumerate(listing["images"]):
            if image["id"] in captions:
                raise UserError(f"{path}: image {number} has the id {image['id']} of an earlier one. Remove one.")
            captions[image["id"]] = []
            name = _file_name(image["file_name"], f"{path}, image {number}: file_name")
            rows.append((image["id"], Row(number, name, name, ())))
        for number, annotation in enumerate(listing["annotations"]):
            if annotation["image_id"] not in captions:
                raise UserError(f"{path}: annotation {number} is for image id {annotation['image_id']}, not in images")
            place = f"{path}, annotation {number}"
            captions[annotation["image_id"]] += string_list(annotation["caption"], "caption", place)
    except (KeyError, TypeError) as error:
        _wrong_layout(
            path, "COCO captions file", '"images": [{id, file_name}], "annotations": [{image_id, caption}]', error
        )
    return _unique(path, "image", (replace(row, captions=not_blank(captions[id_])) for id_, row in rows))


def read_karpathy(path: Path, split: str | None) -> list[Row]:
    """Read one split of a Karpathy split file (COCO, Flickr30k); `train` includes `restval`, as is the custom.

    Raises:
        UserError: the file has another layout, has no such split, or a file name occurs twice.
    """
    splits_read = ("train", "restval") if split == "train" else (split,)
    listing = _json_file(path)
    rows = []
    try:
        for number, image in enumerate(listing["images"]):
            if image["split"] in splits_read:
                name = _file_name(image["filename"], f"{path}, image {number}: filename")
                name = "/".join(part for part in (image.get("filepath"), name) if part)
                texts = [string_list(s["raw"], "raw", f"{path}, image {number}") for s in image["sentences"]]
                rows.append(Row(number, name, name, not_blank(text for sentence in texts for text in sentence)))
        splits = sorted({image["split"] for image in listing["images"]})
    except (KeyError, TypeError, AttributeError) as error:
        _wrong_layout(path, "Karpathy split file", '"images": [{filename, split, sentences: [{raw}]}]', error)
    if len(rows) == 0 and len(splits) > 0:
        raise UserError(f"{path} has no split {split}; its splits: {', '.join(splits)}. Set split.")
    return _unique(path, "image", rows)


def read_xm3600(path: Path, images: Path) -> list[Row]:
    """Read Crossmodal-3600's captions.jsonl, the captions of all languages side by side.

    The listing names no files: the image is `<key>.<extension>` in `images`, `.jpg` (the original's) if none exists.

    Raises:
        UserError: a line is not a JSON object, or a key is missing or occurs twice.
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
                texts += [(text, lang) for text in not_blank(string_list(entry.get("caption"), lang, place))]
        name = next((name for name in names if name in present), names[0])
        rows.append(Row(line, key, name, tuple(text for text, _ in texts), tuple(lang for _, lang in texts)))
    return _unique(path, "line", rows)


def _row(record: Mapping[str, Any], columns: Columns, path: Path, line: int) -> Row:
    place = f"{path}, line {line}"
    image = _file_name(record.get(columns.image or ""), f"{place}: {columns.image}")
    captions, langs = columns.captions_of(record, place)
    return Row(line, columns.key_of(record, image, place), image, captions, langs, columns.label_of(record, place))


def _file_name(value: Any, place: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise UserError(f"{place} is {'missing' if value is None else f'{value!r:.80}'}, expected the path of an image")


def _merge(path: Path, rows: Iterable[Row]) -> list[Row]:
    """Join the rows of one image, in the place of its first."""
    merged: dict[str, Row] = {}
    for row in rows:
        first = merged.setdefault(row.key, row)
        if first is row:
            continue
        places = f"line {first.number} and line {row.number} of {path}"
        if first.image != row.image:
            raise UserError(
                f"the key {row.key} names two images, on {places}. Keys must be unique; rename one, or set key_column."
            )
        if first.label != row.label:
            raise UserError(
                f"{row.image} has labels {first.label} and {row.label}, on {places}. An image has one label; fix one."
            )
        captions, langs = first.captions + row.captions, first.langs + row.langs
        merged[row.key] = replace(first, captions=captions, langs=langs)
    return list(merged.values())


def _unique(path: Path, noun: str, rows: Iterable[Row]) -> list[Row]:
    by_key: dict[str, Row] = {}
    for row in rows:
        first = by_key.setdefault(row.key, row)
        if first is not row:
            places = f"{noun} {first.number} and {noun} {row.number} of {path}"
            raise UserError(f"the key {row.key} occurs twice: {places}. Keys must be unique; remove one.")
    return list(by_key.values())


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, a byte order mark allowed; decoded one by one so that a bad byte has a line number."""
    offset = 0
    try:
        # Read at once, as the rows are kept anyway: no file stays open where a bad line ends the reading.
        data = read_regular(path, MAX_LISTING_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
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
    raise UserError(
        f"{path} is not a {what}, {{{layout}}}: {type(error).__name__} {error}. Check the format."
    ) from error
