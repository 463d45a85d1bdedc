"""Names as matplotlib can draw them: in one line, in installed fonts that have the letters, or replaced by a number."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_MAX_LETTERS = 40


@dataclass(frozen=True)
class Lettering:
    """Names as a figure can show them."""

    texts: list[str]
    """One line each, at most 40 letters; the stand-in of a name that no font can draw."""
    families: list[str]
    """Font families that together have all letters of the texts."""
    note: str
    """Which letters no font has; empty if all can be drawn."""


def lettering(names: Sequence[str], stand_ins: Sequence[str]) -> Lettering:
    """Choose fonts for the names; a name that no font can draw is replaced by its stand-in."""
    texts = [_in_one_line(name) for name in names]
    families, missing = _families(sorted({letter for text in texts for letter in text}))
    drawable = [text != "" and missing.isdisjoint(text) for text in texts]
    shown = [text if can else other for text, can, other in zip(texts, drawable, stand_ins, strict=True)]
    letters = "".join(sorted(missing))
    ellipsis = "…" if len(letters) > 20 else ""
    note = f"no installed font has {letters[:20]}{ellipsis}: names with these letters are shown as numbers"
    return Lettering(shown, families, note if len(missing) > 0 else "")


def _in_one_line(name: str) -> str:
    """Without line breaks, control characters and variation selectors; a long name is shortened in the middle."""
    kept = (c for c in name if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f")
    text = " ".join("".join(c if c.isprintable() else " " for c in kept).split())
    half = _MAX_LETTERS // 2
    return text if len(text) <= _MAX_LETTERS else f"{text[: half - 1]}…{text[-half:]}"


def _families(letters: Sequence[str]) -> tuple[list[str], set[str]]:
    """Font families that together have the letters, matplotlib's default first; and the letters that none has."""
    from matplotlib import font_manager

    default = font_manager.FontProperties()
    families, missing = list(default.get_family()), _missing_letters(default, set(letters))
    for name in sorted(
        _regular_families(font_manager.fontManager.ttflist),
        key=lambda name: (not re.search("sans|gothic", name, re.IGNORECASE), name),
    ):
        if len(missing) == 0:
            break
        still_missing = _missing_letters(font_manager.FontProperties(family=name), missing)
        if still_missing < missing:
            families.append(name)
            missing = still_missing
    return families, missing


def _regular_families(fonts: Sequence[Any]) -> set[str]:
    """Families with a regular face; matplotlib warns about others, and Last Resort has a box for every letter."""
    from matplotlib.font_manager import weight_dict

    regular = (font for font in fonts if weight_dict.get(font.weight, font.weight) == 400 and font.style == "normal")
    return {font.name for font in regular if not font.name.startswith("Last Resort")}


def _missing_letters(font: Any, letters: set[str]) -> set[str]:
    """The letters that a font cannot draw: all of them for a bitmap font, or one that cannot be opened."""
    from matplotlib import font_manager

    try:
        path = font_manager.findfont(font, fallback_to_default=False, rebuild_if_missing=False)
        face = font_manager.get_font(path)
        face.set_size(10, 72)
    except (OSError, RuntimeError, ValueError):
        return letters
    return {letter for letter in letters if not face.get_char_index(ord(letter))}
