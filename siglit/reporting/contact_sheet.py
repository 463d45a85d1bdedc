"""A contact sheet: queries with their retrieved images, correct images framed green and others red.

Images in, an image out; knows nothing of caches or towers.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_SIDE, _GAP, _TEXT_WIDTH, _FRAME = 128, 14, 380, 5
"""Pixels."""
_GREEN, _RED, _INK, _GREY = (38, 150, 70), (205, 60, 55), (30, 30, 35), (110, 110, 115)


@dataclass(frozen=True)
class SheetImage:
    """One retrieved image."""

    image: Image.Image
    score: float
    """Cosine between image and query."""
    correct: bool
    """The query is a caption of this image."""


def draw_contact_sheet(title: str, rows: Sequence[tuple[str, Sequence[SheetImage]]]) -> Image.Image:
    """Draw one row per query, its images side by side in the given order."""
    most = max(len(images) for _, images in rows)
    head, row_height = 56, _SIDE + 2 * _GAP + 16
    size = (_TEXT_WIDTH + most * (_SIDE + _GAP) + 2 * _GAP, head + len(rows) * row_height + _GAP)
    page = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(page)
    pen.text((_GAP, 16), title, fill=_INK, font=ImageFont.load_default(20))
    body, small = ImageFont.load_default(16), ImageFont.load_default(13)
    for number, (query, images) in enumerate(rows):
        top = head + number * row_height
        pen.line((_GAP, top, size[0] - _GAP, top), fill=(225, 225, 228))
        lines = textwrap.wrap(query, width=44)
        middle = top + _GAP + _SIDE // 2 - 11 * len(lines)
        for i, line in enumerate(lines):
            pen.text((_GAP, middle + 22 * i), line, fill=_INK, font=body)
        for column, retrieved in enumerate(images):
            left = _TEXT_WIDTH + column * (_SIDE + _GAP)
            box = (left - _FRAME, top + _GAP - _FRAME, left + _SIDE + _FRAME - 1, top + _GAP + _SIDE + _FRAME - 1)
            pen.rectangle(box, fill=_GREEN if retrieved.correct else _RED)
            thumbnail = retrieved.image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            page.paste(thumbnail, (left, top + _GAP))
            pen.text((left, top + _GAP + _SIDE + 7), f"{retrieved.score:.3f}", fill=_GREY, font=small)
    return page
