"""The gallery frames right answers green and wrong ones red, and shows each picture in its own frame."""

import numpy as np
import pytest
from PIL import Image

from siglit.reporting.contact_sheet import _FRAME, _GAP, _GREEN, _RED, _SIDE, _TEXT_WIDTH, Answer, draw_gallery

WHITE = (255, 255, 255)


def answer(colour, right):
    return Answer(Image.new("RGB", (20, 31), colour), 0.5, right)


@pytest.fixture(scope="module")
def page():
    """Two queries with three and two answers, each a different plain colour."""
    rows = [
        ("a first query", [answer((0, 0, 255), True), answer((1, 2, 3), False), answer((9, 90, 200), True)]),
        ("a second query " * 20, [answer((250, 0, 250), False), answer((0, 200, 200), True)]),
    ]
    return rows, np.asarray(draw_gallery("title", rows))


def frames(rows):
    """Top left corner of each thumbnail and the answer that belongs there."""
    for number, (_, answers) in enumerate(rows):
        for place, item in enumerate(answers):
            yield 56 + number * (_SIDE + 2 * _GAP + 16) + _GAP, _TEXT_WIDTH + place * (_SIDE + _GAP), item


def test_every_thumbnail_has_its_own_frame_colour(page):
    rows, pixels = page
    for top, left, item in frames(rows):
        wanted = _GREEN if item.right else _RED
        before, behind, middle = -_FRAME, _SIDE + _FRAME - 1, _SIDE // 2
        for y, x in [(before, before), (before, behind), (behind, before), (behind, behind), (middle, before), (-1, 5)]:
            assert tuple(pixels[top + y, left + x]) == wanted
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
    picture = draw_gallery("t", [("q", [Answer(Image.new(mode, (8, 8)), 1.0, True) for mode in ("L", "RGBA", "1")])])
    assert picture.mode == "RGB"
