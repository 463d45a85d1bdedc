"""The contact sheet frames correct images green and others red, and shows each image in its own frame."""

import numpy as np
import pytest
from PIL import Image

from siglit.reporting.contact_sheet import (
    _FRAME,
    _GAP,
    _GREEN,
    _RED,
    _SIDE,
    _TEXT_WIDTH,
    SheetImage,
    draw_contact_sheet,
)

WHITE = (255, 255, 255)


def sheet_image(color, correct):
    return SheetImage(Image.new("RGB", (20, 31), color), 0.5, correct)


@pytest.fixture(scope="module")
def page():
    """Two queries with three and two images, each of a different color."""
    rows = [
        (
            "a first query",
            [sheet_image((0, 0, 255), True), sheet_image((1, 2, 3), False), sheet_image((9, 90, 200), True)],
        ),
        ("a second query " * 20, [sheet_image((250, 0, 250), False), sheet_image((0, 200, 200), True)]),
    ]
    return rows, np.asarray(draw_contact_sheet("title", rows))


def frames(rows):
    """Top left corner of each thumbnail and the image that belongs there."""
    for number, (_, images) in enumerate(rows):
        for column, item in enumerate(images):
            yield 56 + number * (_SIDE + 2 * _GAP + 16) + _GAP, _TEXT_WIDTH + column * (_SIDE + _GAP), item


def test_every_thumbnail_has_its_own_frame_color(page):
    rows, pixels = page
    for top, left, item in frames(rows):
        expected = _GREEN if item.correct else _RED
        before, behind, middle = -_FRAME, _SIDE + _FRAME - 1, _SIDE // 2
        for y, x in [(before, before), (before, behind), (behind, before), (behind, behind), (middle, before), (-1, 5)]:
            assert tuple(pixels[top + y, left + x]) == expected
        assert tuple(pixels[top + middle, left - _FRAME - 1]) == WHITE
        assert tuple(pixels[top + middle, left + _SIDE + _FRAME]) == WHITE


def test_every_thumbnail_shows_its_own_picture_squashed_to_the_square(page):
    rows, pixels = page
    for top, left, item in frames(rows):
        inside = pixels[top : top + _SIDE, left : left + _SIDE]
        assert (inside == item.image.getpixel((0, 0))).all()


def test_text_stays_left_of_the_pictures(page):
    """Also a long query: the column between text and frames is empty, and something is written."""
    _, pixels = page
    below_title = pixels[60:]
    assert (below_title[:, _TEXT_WIDTH - _FRAME - 3] == 255).mean() > 0.98
    assert (below_title[:, _GAP : _TEXT_WIDTH - 2 * _FRAME] < 100).any()


def test_pictures_of_any_mode_are_taken():
    picture = draw_contact_sheet(
        "t", [("q", [SheetImage(Image.new(mode, (8, 8)), 1.0, True) for mode in ("L", "RGBA", "1")])]
    )
    assert picture.mode == "RGB"
