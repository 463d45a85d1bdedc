"""A picture of queries with the images that were found for them, right answers framed green and wrong ones red.

Pictures in, a picture out; knows nothing of caches or towers.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_SIDE, _GAP, _TEXT_WIDTH, _FRAME = 128, 14, 380, 5
_GREEN, _RED, _INK, _GREY = (38, 150, 70), (205, 60, 55), (30, 30, 35), (110, 110, 115)


@dataclass(frozen=True)
class Answer:
    """One image that was found."""

    image: Image.Image
    score: float
    """Cosine between image and query."""
    right: bool
    """The query was written for this image."""


def draw_gallery(title: str, rows: Sequence[tuple[str, Sequence[Answer]]]) -> Image.Image:
    """Draw one row per query, its answers side by side, best first."""
    most = max(len(answers) for _, answers in rows)
    head, row_height = 56, _SIDE + 2 * _GAP + 16
    size = (_TEXT_WIDTH + most * (_SIDE + _GAP) + 2 * _GAP, head + len(rows) * row_height + _GAP)
    page = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(page)
    pen.text((_GAP, 16), title, fill=_INK, font=ImageFont.load_default(20))
    body, small = ImageFont.load_default(16), ImageFont.load_default(13)
    for number, (query, answers) in enumerate(rows):
        top = head + number * row_height
        pen.line((_GAP, top, size[0] - _GAP, top), fill=(225, 225, 228))
        lines = textwrap.wrap(query, width=44)
        middle = top + _GAP + _SIDE // 2 - 11 * len(lines)
        for i, line in enumerate(lines):
            pen.text((_GAP, middle + 22 * i), line, fill=_INK, font=body)
        for place, answer in enumerate(answers):
            left = _TEXT_WIDTH + place * (_SIDE + _GAP)
            box = (left - _FRAME, top + _GAP - _FRAME, left + _SIDE + _FRAME - 1, top + _GAP + _SIDE + _FRAME - 1)
            pen.rectangle(box, fill=_GREEN if answer.right else _RED)
            thumbnail = answer.image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            page.paste(thumbnail, (left, top + _GAP))
            pen.text((left, top + _GAP + _SIDE + 7), f"{answer.score:.3f}", fill=_GREY, font=small)
    return page
