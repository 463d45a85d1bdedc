"""Options of a data set (`SourceSpec`): which ones a format reads, the fold, and the identity that they give.

Opens no data set.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from siglit.config import Format, SourceSpec
from siglit.data.sources.columns import Columns
from siglit.errors import UserError

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


def check_options(spec: SourceSpec) -> None:
    """Compare the options that are set with those that the format reads.

    Raises:
        UserError: the format is unknown, does not read an option that is set, or needs `split`, which is not set.
    """
    if spec.format not in get_args(Format):
        raise UserError(f"unknown source format {spec.format!r}; formats: {', '.join(get_args(Format))}")
    for option in ("images", "image_column", *_TEXT_OPTIONS, "separator", "split"):
        if getattr(spec, option) is not None and option not in _OPTIONS[spec.format]:
            known = ", ".join((*_OPTIONS[spec.format], "fold"))
            raise UserError(f"{option} is not an option of source format {spec.format}; remove it. Options: {known}")
    if "split" in _OPTIONS[spec.format] and spec.split is None:
        raise UserError(f"source format {spec.format} needs split (such as train, val, test)")


def identity_of(spec: SourceSpec, paths: Iterable[Path]) -> dict[str, Any]:
    """Format, names and sizes of the files, and the options that are set.

    `images` is not among them: it says where files lie on this machine.
    """
    names = ("image_column", *_TEXT_OPTIONS, "separator", "split", "fold")
    options = {name: getattr(spec, name) for name in names if getattr(spec, name) is not None}
    files = sorted([path.name, path.stat().st_size] for path in paths)
    return {"format": spec.format, "files": files, "options": options}


def columns_of(spec: SourceSpec) -> Columns:
    """The columns that the options name."""
    captions = tuple(name.strip() for name in (spec.caption_column or "").split(",") if name.strip())
    return Columns(spec.image_column, captions, spec.key_column, spec.label_column, spec.lang_column)


def separator_of(spec: SourceSpec, path: Path) -> str:
    """The separator of a csv file: a comma for `.csv`, else a tab, unless the option is set.

    Raises:
        UserError: separator is not one character.
    """
    # YAML keeps the two characters of an unquoted \t.
    separator = {None: "," if path.suffix == ".csv" else "\t", r"\t": "\t"}.get(spec.separator, spec.separator) or ""
    if len(separator) != 1:
        raise UserError(f"separator is {spec.separator!r}, expected one character, such as ',' or '\\t'")
    return separator


class Fold:
    """The share of keys to keep; by sha256, so that a key falls on the same side in every process and version."""

    def __init__(self, text: str | None) -> None:
        """Parse the option `fold`, such as 0-8/10 or 9/10; None keeps all keys.

        Raises:
            UserError: it has another form.
        """
        match = re.fullmatch(r"(\d+)(?:-(\d+))?/(\d+)", "0/1" if text is None else text)
        low, high, self._parts = (int(part or match[1]) for part in match.groups()) if match else (1, 0, 0)
        if not low <= high < self._parts:
            raise UserError(f"fold is {text!r}; expected FIRST-LAST/PARTS with LAST < PARTS, such as 0-8/10 or 9/10")
        self._kept = range(low, high + 1)

    def keeps(self, key: str) -> bool:
        """Whether the key is in the fold."""
        if self._parts == 1:
            return True
        return int.from_bytes(hashlib.sha256(key.encode()).digest()) % self._parts in self._kept
