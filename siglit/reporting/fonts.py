"""Names as matplotlib can draw them: one line, in fonts that have the letters, or a number instead."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_MOST_LETTERS = 40


@dataclass(frozen=True)
class Lettering:
    """Names as a picture can show them."""

    texts: list[str]
    """In one line each, shortened where they are very long; a stand-in where no font has the letters."""
    families: list[str]
    """Fonts that draw the texts between them."""
    note: str
    """Which letters no font has, or nothing."""


def lettering(names: Sequence[str], stand_ins: Sequence[str]) -> Lettering:
    """Choose fonts for the names; a name that no font can draw is replaced by its stand-in."""
    texts = [_in_one_line(name) for name in names]
    families, lacking = _families(sorted({letter for text in texts for letter in text}))
    drawable = [bool(text) and not lacking.intersection(text) for text in texts]
    shown = [text if can else other for text, can, other in zip(texts, drawable, stand_ins, strict=True)]
    letters = "".join(sorted(lacking))
    note = f"no installed font has {letters[:20]}{'…' if letters[20:] else ''}: names with them are drawn as numbers"
    return Lettering(shown, families, note if lacking else "")


def _in_one_line(name: str) -> str:
    """Without line breaks and controls, nor the marks that only tell how their neighbours are drawn."""
    kept = (c for c in name if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f")
    text = " ".join("".join(c if c.isprintable() else " " for c in kept).split())
    half = _MOST_LETTERS // 2
    return text if len(text) <= _MOST_LETTERS else f"{text[: half - 1]}…{text[-half:]}"


def _families(letters: Sequence[str]) -> tuple[list[str], set[str]]:
    """Families that have the letters between them, matplotlib's own first, and the letters that none has."""
    from matplotlib import font_manager

    usual = font_manager.FontProperties()
    families, lacking = list(usual.get_family()), _lacking(usual, set(letters))
    for name in sorted(
        _upright(font_manager.fontManager.ttflist),
        key=lambda name: (not re.search("sans|gothic", name, re.IGNORECASE), name),
    ):
        if not lacking:
            break
        left = _lacking(font_manager.FontProperties(family=name), lacking)
        if left < lacking:
            families.append(name)
            lacking = left
    return families, lacking


def _upright(fonts: Sequence[Any]) -> set[str]:
    """Families of the usual weight; of others matplotlib complains, and that of last resort has boxes for all."""
    from matplotlib.font_manager import weight_dict

    regular = (font for font in fonts if weight_dict.get(font.weight, font.weight) == 400 and font.style == "normal")
    return {font.name for font in regular if not font.name.startswith("Last Resort")}


def _lacking(font: Any, letters: set[str]) -> set[str]:
    """Those of the letters that a font cannot draw; one of bitmaps alone can draw nothing."""
    from matplotlib import font_manager

    try:
        path = font_manager.findfont(font, fallback_to_default=False, rebuild_if_missing=False)
        face = font_manager.get_font(path)
        face.set_size(10, 72)
    except (OSError, RuntimeError, ValueError):
        return letters
    return {letter for letter in letters if not face.get_char_index(ord(letter))}
