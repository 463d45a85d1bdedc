"""The picture of curves: what is drawn, in which colors, and the message where nothing can be drawn."""

import sys

import pytest

pytest.importorskip("matplotlib")

import numpy as np
from PIL import Image

import siglit
from siglit.cli import main
from siglit.commands import plot
from siglit.errors import UserError
from siglit.reporting import confusion, curves, fonts

HEADER = "epoch,step,train/loss,train/lr,train/grad_norm,train/text_tower/grad_norm,val/text_to_image/R@1"


def make_run(folder, *lines, header=HEADER):
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("\n".join([header, *lines]) + "\n")
    return str(folder)


@pytest.fixture
def a(tmp_path):
    return make_run(tmp_path / "a", "0,0,9,0.1,5,4,", "0,1,nan,0.2,6,4,", "0,1,,,,,0.25", "0,2,8,0.3,7,4,")


@pytest.fixture
def b(tmp_path):
    return make_run(tmp_path / "b", "0,0,7,0.1,,,")


def error_line(capsys, *words):
    """The one line on standard error of a command that is refused."""
    with pytest.raises(SystemExit) as stop:
        main(["plot", *words])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_a_row_that_is_still_being_written_is_left_out(tmp_path):
    make_run(tmp_path / "a", "0,0,9,0.1,5,4,", "0,1,8,0.")
    assert curves.read_metrics_csv(tmp_path / "a")["train/lr"] == [(1, 0.1)]


def test_curves_count_steps_from_one_and_skip_non_numbers(a, tmp_path):
    columns = curves.read_metrics_csv(tmp_path / "a")
    assert columns["train/loss"] == [(1, 9), (3, 8)]
    assert columns["train/lr"] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert columns["val/text_to_image/R@1"] == [(2, 0.25)]


def test_only_panels_with_data_are_drawn(a, b, tmp_path):
    both = curves.draw_curves(
        {"a": curves.read_metrics_csv(tmp_path / "a"), "b": curves.read_metrics_csv(tmp_path / "b")}
    )
    assert titles(both) == ["loss", "learning rate", "held-out R@1", "gradient norm (before clipping)"]
    assert titles(curves.draw_curves({"b": curves.read_metrics_csv(tmp_path / "b")})) == ["loss", "learning rate"]


def test_a_run_has_one_color_and_a_column_one_dash(a, b, tmp_path):
    drawn = curves.draw_curves(
        {"a": curves.read_metrics_csv(tmp_path / "a"), "b": curves.read_metrics_csv(tmp_path / "b")}
    )
    loss, lr, _, norms = drawn.axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[1, 9], [3, 8]], [[1, 7]]]
    assert [line.get_color() for line in loss.lines] == [line.get_color() for line in lr.lines]
    assert loss.lines[0].get_color() != loss.lines[1].get_color()
    assert loss.get_xscale() == "log"
    assert [line.get_linestyle() for line in norms.lines] == ["-", "--"]
    assert len({line.get_color() for line in norms.lines}) == 1
    assert [text.get_text() for text in norms.get_legend().get_texts()] == ["all", "text tower"]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["a", "b"]


def test_runs_of_one_name_are_distinguished_by_their_folders(a, tmp_path):
    other = make_run(tmp_path / "other" / "a", "0,0,7,0.1,,,")
    assert plot._names([a, other]) == [a, other]
    assert plot._names([a]) == ["a"]


def test_the_command_writes_a_readable_png_and_says_where(a, b, tmp_path, capsys, monkeypatch):
    """Also where there is no display, and for a run that is given twice."""
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["plot", a, b, a, "--out", str(tmp_path / "new" / "curves.png")])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "curves.png")
    with Image.open(tmp_path / "new" / "curves.png") as picture:
        assert picture.format == "PNG"
        assert picture.width == 1600
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.parametrize(
    ("header", "lines", "text"),
    [
        (HEADER, ["0,0,nine,0.1,5,4,"], "is not the metrics.csv of a run"),
        ("when,what", ["1,2"], "is not the metrics.csv of a run"),
        (HEADER, ["0,0,1,2,3,4,5,6"], "is not the metrics.csv of a run"),
        (HEADER, ["0,0,1,2"], "no rows yet"),
        (HEADER, ["0,0,\x00\udc80"], "is not the metrics.csv of a run"),
        (HEADER, [], "no rows yet"),
        ("step,other", ["0,1"], "none of the columns"),
    ],
)
def test_a_file_without_curves_is_named(tmp_path, capsys, header, lines, text):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.csv").write_bytes("\n".join([header, *lines]).encode(errors="surrogateescape"))
    line = error_line(capsys, str(folder))
    assert text in line
    assert "run" in line


def test_a_folder_without_curves_is_named(tmp_path, capsys):
    assert f"{tmp_path}/metrics.csv does not exist" in error_line(capsys, str(tmp_path))


def test_another_format_than_png_is_refused(a, capsys):
    assert "curves.pdf" in error_line(capsys, a, "--out", "curves.pdf")


def test_few_classes_are_named_and_many_are_not():
    """Shares are of a row's own images; a row without images stays blank."""
    counts = np.array([[3, 1, 0], [0, 0, 0], [0, 2, 2]])
    axes = confusion.draw_confusion(counts, ["cat", "dog", "emu"]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "emu"]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "75",
        (1, 0): "25",
        (1, 2): "50",
        (2, 2): "50",
    }
    shown = axes.images[0].get_array()
    assert np.ma.getmaskarray(shown)[1].all() or np.isnan(np.ma.getdata(shown)[1]).all()
    few = axes.figure
    few.canvas.draw()
    page, drawn = few.get_size_inches(), few.get_tightbbox()
    assert min(drawn.x0, drawn.y0) >= 0, "nothing is cut off"
    assert np.all([drawn.x1, drawn.y1] <= page)
    many = confusion.draw_confusion(np.eye(1000, dtype=np.int64), [f"class {i}" for i in range(1000)])
    many.canvas.draw()
    assert not any("class" in label.get_text() for label in many.axes[0].get_yticklabels())
    assert not list(many.axes[0].texts)


def test_without_matplotlib_the_extra_is_named(a, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'siglit\[plots\]'"):
        siglit.plot([a], str(tmp_path / "curves.png"))
    assert not (tmp_path / "curves.png").exists()


ODD_NAMES = {
    "dollars": ("$a_$b", "$a_$b"),
    "two lines": ("a\nb\tc", "a b c"),
    "a control": ("a\x00b", "a b"),
    "half a pair": ("\ud800", None),
    "empty": ("", None),
    "private": ("\ue000", None),
    "very long": ("x" * 500, "x" * 19 + "…" + "x" * 20),
    "joined": ("e\u200dmu", "emu"),
    "underscore": ("_emu", "_emu"),
    "no font": ("柴犬", None),
}


@pytest.fixture
def plain_fonts(monkeypatch):
    """The fonts of matplotlib alone, whatever this machine has."""
    from matplotlib import font_manager

    own = [font for font in font_manager.fontManager.ttflist if "matplotlib" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    font_manager.fontManager._findfont_cached.cache_clear()
    return font_manager.fontManager


@pytest.mark.parametrize(("name", "shown"), ODD_NAMES.values(), ids=ODD_NAMES)
def test_any_name_is_drawn_or_has_a_number(plain_fonts, tmp_path, recwarn, caplog, name, shown):
    """Without a warning, a log line, or a box in place of a letter."""
    drawn = confusion.draw_confusion(np.eye(2, dtype=int), ["cat", name])
    curves.save_png(drawn, tmp_path / "confusion.png")
    for axis in (drawn.axes[0].xaxis, drawn.axes[0].yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == ["cat", shown or "1"]
    picture = curves.draw_curves({"cat": {"train/loss": [(1, 2.0)]}, name: {"train/loss": [(1, 1.0)]}})
    curves.save_png(picture, tmp_path / "curves.png")
    assert [text.get_text() for text in picture.legends[0].get_texts()] == ["cat", shown or "run 2"]
    assert not recwarn.list
    assert not caplog.records


def test_letters_that_no_font_has_are_reported(plain_fonts, tmp_path):
    """In the command's answer; of so many classes that they are numbered anyway nothing is said."""
    run = make_run(tmp_path / "柴犬", "0,0,9,0.1,5,4,")
    text = str(siglit.plot([run], str(tmp_path / "curves.png")))
    assert text.splitlines()[1:] == ["no installed font has 柴犬: names with these letters are shown as numbers"]
    assert confusion.class_lettering(["柴犬"] * 2).note.startswith("no installed font has 柴犬")
    assert confusion.class_lettering(["柴犬"] * 41).note == ""
    assert confusion.class_lettering([chr(0x4E00 + n) * 2 for n in range(40)]).note.count("…") == 1


def test_a_font_that_has_the_letters_is_chosen(plain_fonts, tmp_path, recwarn, caplog):
    """Several where none has all; only for names that need it; none that is gone or of another weight."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for number, point in enumerate([(0, 0), (500, 700), (900, 0)]):
        (pen.lineTo if number else pen.moveTo)(point)
    pen.closePath()
    font_files = (
        ("A Sans Gone", "柴犬", 400),
        ("A Sans Light", "柴犬", 300),
        ("Small Gothic", "柴", 400),
        ("Tiny", "犬柴", 400),
    )
    for family, letters, weight in font_files:
        font = FontBuilder(1000)
        names = [".notdef", *(f"uni{ord(letter):04X}" for letter in letters)]
        font.setupGlyphOrder(names)
        font.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
        font.setupGlyf(dict.fromkeys(names, pen.glyph()))
        font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
        font.setupHorizontalHeader(ascent=800, descent=-200)
        font.setupNameTable({"familyName": family, "styleName": "Regular"})
        font.setupOS2(usWeightClass=weight)
        font.setupPost()
        font.save(tmp_path / f"{family}.ttf")
        plain_fonts.addfont(str(tmp_path / f"{family}.ttf"))
    (tmp_path / "A Sans Gone.ttf").unlink()
    letters = confusion.class_lettering(["柴犬", "cat"])
    assert letters == fonts.Lettering(["柴犬", "cat"], ["sans-serif", "Small Gothic", "Tiny"], "")
    assert confusion.class_lettering(["Käse", "cat"]).families == ["sans-serif"]
    curves.save_png(confusion.draw_confusion(np.eye(2, dtype=int), ["柴犬", "cat"]), tmp_path / "confusion.png")
    assert not recwarn.list
    assert not caplog.records


def test_values_beyond_any_axis_are_left_out(tmp_path, recwarn):
    make_run(tmp_path / "a", "0,0,1e308,0.1,1e308,-1e308,", "0,1,1e99,-1e99,1e-320,4,")
    columns = curves.read_metrics_csv(tmp_path / "a")
    assert columns["train/loss"] == [(2, 1e99)]
    curves.save_png(curves.draw_curves({"a": columns}), tmp_path / "curves.png")
    assert not recwarn.list


def test_a_table_saved_by_a_spreadsheet_is_read_and_columns_of_other_letters_are_not_drawn(tmp_path, recwarn):
    (tmp_path / "metrics.csv").write_text("\ufeffstep,train/柴犬/grad_norm,train/grad_norm\n0,1,2\n", encoding="utf-8")
    columns = curves.read_metrics_csv(tmp_path)
    assert set(columns) == {"train/柴犬/grad_norm", "train/grad_norm"}
    drawn = curves.draw_curves({"a": columns})
    curves.save_png(drawn, tmp_path / "curves.png")
    assert len(drawn.axes[0].lines) == 1
    assert not recwarn.list
