"""Columns of a record: which one holds the image, captions, key, label and languages, and their values.

Knows the default columns of each format; does not know where records come from (`listings.py`, `tables.py`, `tars.py`).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from siglit.data.sources.texts import is_unicode, replace_surrogates
from siglit.errors import UserError
from siglit.runtime.text import plural

# Image and caption columns where none are named; the first that exists is used. csv is open_clip's choice.
DEFAULTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "csv": (("filepath",), ("title",)),
    "jsonl": (("image", "filepath"), ("caption", "title")),
    "folder": (("file_name",), ("text", "caption")),
    "parquet": (("image",), ("caption",)),
    "hub": (("image",), ("caption",)),
}


@dataclass(frozen=True)
class Columns:
    """Names of the columns; None or empty: there is no such column, or it is not chosen yet."""

    image: str | None = None
    captions: tuple[str, ...] = ()
    key: str | None = None
    label: str | None = None
    lang: str | None = None
    label_required: bool = True

    def resolve(self, fmt: str, names: Iterable[str], where: str) -> "Columns":
        """Fill in the defaults of a format.

        Args:
            fmt: source format.
            names: the columns that exist.
            where: opens the message.

        Raises:
            UserError: a column is missing. Caption columns may be missing if none is named and there is a label column.
        """
        names = list(names)

        def missing(what: str, option: str) -> NoReturn:
            shown = f"{', '.join(names)}"
            shown = shown if len(shown) <= 300 else f"{shown[:300]} …"
            raise UserError(f"{where} has no column {what}; its columns: {shown}. Set {option}.")

        images, captions = DEFAULTS[fmt]
        image = self.image or next((name for name in images if name in names), None)
        if image is None:
            missing(" or ".join(images), "image_column")
        chosen = self.captions or tuple(name for name in captions if name in names)[:1]
        if len(chosen) == 0 and self.label is None:
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
        """The record's key as text; `default` where no key column is named.

        Raises:
            UserError: the key is empty, neither text nor an integer, or not valid Unicode.
        """
        value = record.get(self.key) if self.key else default
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            state = f"the key ({self.key}) is missing" if value is None else f"the key is {value!r:.80}"
            raise UserError(f"{place}: {state}, expected a non-empty text or an integer")
        key = str(value)
        if not is_unicode(key):
            raise UserError(f"{place}: the key {key!r} is not valid Unicode (half of a surrogate pair)")
        return key

    def captions_of(self, record: Mapping[str, Any], place: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The record's captions that are not blank, and their languages (none without a language column).

        Raises:
            UserError: a caption is not text, or captions and languages do not match one to one.
        """
        captions = [text for name in self.captions for text in string_list(record.get(name), name, place)]
        if self.lang is None:
            return not_blank(captions), ()
        langs = string_list(record.get(self.lang), self.lang, place)
        if isinstance(record.get(self.lang), str):
            langs = langs * len(captions)
        if len(langs) != len(captions):
            raise UserError(
                f"{place}: {plural(len(captions), 'caption')}, but {plural(len(langs), 'language')} in {self.lang}; "
                "expected one for each"
            )
        kept = [
            (replace_surrogates(text), lang) for text, lang in zip(captions, langs, strict=True) if text.strip() != ""
        ]
        if not all(lang.strip() for _, lang in kept):
            raise UserError(f"{place}: a caption has no language in {self.lang}; expected one for each caption")
        return tuple(text for text, _ in kept), tuple(lang for _, lang in kept)

    def label_of(self, record: Mapping[str, Any], place: str) -> int | None:
        """The record's label; None without a label column.

        Raises:
            UserError: the label is not an integer, or is missing though required.
        """
        value = record.get(self.label) if self.label else None
        if self.label is None or (value is None and not self.label_required):
            return None
        return parse_label(value, f"{place}: {self.label}")


def parse_label(value: Any, place: str) -> int:
    """An integer, or text that is one (csv, `.cls`).

    Raises:
        UserError: it is neither, or more than 64 bits.
    """
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", value):
        return int(value)
    missing = value is None or value == "" or (isinstance(value, float) and math.isnan(value))
    raise UserError(f"{place} is {f'missing ({value!r})' if missing else repr(value)}, but a label is an integer")


def string_list(value: Any, name: str, place: str) -> list[str]:
    """A text, a list of texts or None, as a list; a null within a list becomes "", so that lists stay parallel.

    Raises:
        UserError: it is none of these.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(text is not None and not isinstance(text, str) for text in values):
        raise UserError(f"{place}: {name} is {value!r:.80}, expected a text or a list of texts")
    return [text or "" for text in values]


def not_blank(texts: Iterable[str]) -> tuple[str, ...]:
    """The texts that are not blank, in a form that UTF-8 can store."""
    return tuple(replace_surrogates(text) for text in texts if text.strip() != "")
