"""`siglit plot RUN RUN ...`: the curves of several runs in one picture; and the picture of a confusion matrix.

Reads metrics.csv and knows the names of its columns; the only home of matplotlib.
"""

import csv
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siglit.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = list[tuple[int, float]]
"""(steps taken, value), ascending."""

_DPI = 100
_WIDTH_INCHES, _ROW_INCHES = 16.0, 2.7
_COLUMNS = 3
_DASHES = ("-", "--", ":", "-.")
_MOST_STEPS = 2**53
"""Beyond, not every whole number has a place on an axis."""
_LARGEST = 1e100
"""No logged float32 comes near, and the axes overflow a long way beyond."""
_MOST_NUMBERS, _MOST_NAMES = 15, 40
"""Classes up to which a confusion matrix has its shares written in, and its rows and columns named."""
_MOST_LETTERS = 40


@dataclass(frozen=True)
class PlotResult:
    """Where the picture is."""

    path: str
    note: str = ""
    """Why a run is not called by its name, or nothing."""

    def __str__(self) -> str:
        """The path, and the note."""
        return f"{self.path}\n{self.note}" if self.note else self.path


@dataclass(frozen=True)
class Lettering:
    """Names as a picture can show them."""

    texts: list[str]
    """In one line each, shortened where they are very long; a stand-in where no font has the letters."""
    families: list[str]
    """Fonts that draw the texts between them."""
    note: str
    """Which letters no font has, or nothing."""


@dataclass(frozen=True)
class _Panel:
    title: str
    columns: str
    """Pattern of the columns it shows; its first group, or else the whole name, tells several of them apart."""
    scale: tuple[str, str] = ("linear", "linear")
    """Of the steps and of the values."""


_PANELS = (
    _Panel("loss", r"train/loss", ("log", "log")),
    _Panel("learning rate", r"train/lr"),
    _Panel("logit scale t", r"train/logit_scale"),
    _Panel("logit bias b", r"train/logit_bias"),
    _Panel("mean logit of pairs", r"train/(positive|negative)_logit"),
    _Panel("held-out R@1", r"val/(image_to_text|text_to_image)/R@1"),
    _Panel("gradient norm (before clipping)", r"train/(?:(\w+)/)?grad_norm", ("linear", "log")),
    _Panel("parameter norm", r"train/(\w+)/param_norm"),
    _Panel("update norm", r"train/(\w+)/update_norm", ("linear", "log")),
    _Panel("examples/s", r"train/examples_per_second"),
    _Panel("share of the hardware's peak", r"train/peak_share"),
    _Panel("share of a step's time", r"time/(\w+)", ("linear", "log")),
)


def run(runs: Sequence[str], out: str) -> PlotResult:
    """Draw the curves of the runs' folders into the PNG `out`.

    Raises:
        UserError: matplotlib is missing, or a folder has no curves.
    """
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise UserError(f"--out is {out}, but a picture in PNG is drawn; name it like curves.png")
    curves = {}
    for name, folder in zip(_names(runs), runs, strict=True):
        curves[name] = read(Path(folder))
        if not curves[name]:
            raise UserError(f"{Path(folder) / 'metrics.csv'} has no rows yet; wait for the run's first logged step")
    drawn = figure(curves)
    save(drawn, path)
    return PlotResult(str(path), _run_letters(curves).note)


def save(drawn: "Figure", path: Path) -> None:
    """Write a picture as PNG, with the folders that lead there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=_DPI)


def read(folder: Path) -> dict[str, Curve]:
    """{column: curve} of a run's metrics.csv; steps are counted from 1, what is not a finite number is left out.

    It is empty before the run's first logged step.

    Raises:
        UserError: there is no such file, or it is not one of a run.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the output folders of runs of siglit train")
    curves: dict[str, Curve] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file, strict=True):
                if None in row.values():  # still being written
                    continue
                step = int(row.pop("step")) + 1
                if not 1 <= step <= _MOST_STEPS:
                    raise ValueError(f"step {str(step - 1)[:20]}")
                for name, value in row.items():
                    if value and abs(float(value)) < _LARGEST:
                        curves.setdefault(name, []).append((step, float(value)))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is not the metrics.csv of a run ({type(error).__name__}: {error})") from error
    return {name: sorted(curve) for name, curve in curves.items()}


def figure(runs: Mapping[str, Mapping[str, Curve]]) -> "Figure":
    """Panels of all runs, one colour per run and one dash per column; only those that any run has something for.

    Args:
        runs: {name in the legend: {column: curve}}.

    Raises:
        UserError: matplotlib is missing, or there is nothing to draw.
    """
    try:
        # Not pyplot: a figure of one's own needs no display, and leaves nothing behind.
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ModuleNotFoundError as error:
        raise UserError(f"siglit plot draws with matplotlib ({error}); pip install 'siglit[plots]'") from error
    panels = [panel for panel in _PANELS if any(_columns(panel, curves) for curves in runs.values())]
    if not panels:
        raise UserError(f"{', '.join(runs)}: metrics.csv has none of the columns that are drawn, such as train/loss")
    palette = colormaps["tab10" if len(runs) <= 10 else "turbo"]
    colours = {name: palette(i) if len(runs) <= 10 else palette(i / (len(runs) - 1)) for i, name in enumerate(runs)}
    rows = -(-len(panels) // _COLUMNS)
    drawn = Figure(figsize=(_WIDTH_INCHES, _ROW_INCHES * rows + 0.6), layout="constrained")
    FigureCanvasAgg(drawn)
    for number, panel in enumerate(panels):
        _draw(drawn.add_subplot(rows, _COLUMNS, number + 1), panel, runs, colours)
    letters = _run_letters(runs)
    named = zip(letters.texts, colours.values(), strict=True)
    handles = [Line2D([], [], color=colour, linewidth=3, label=text) for text, colour in named]
    font = {"family": letters.families, "size": 12}
    legend = drawn.legend(
        handles=handles, loc="outside upper center", ncols=min(len(runs), 5), frameon=False, prop=font
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a name is a dollar
    return drawn


def confusion(counts: np.ndarray, names: Sequence[str]) -> "Figure":
    """Where the images of each class went: a row per class, its shares over the columns; named as far as there is room.

    Args:
        counts: (C, C) images of class [row] that were put into class [column]; a row without images stays blank.
        names: C names.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise UserError(f"it takes matplotlib ({error}); pip install 'siglit[plots]'") from error
    images, classes = counts.sum(1, keepdims=True), len(counts)
    shares = np.divide(counts, images, out=np.full(counts.shape, np.nan), where=images > 0)
    side = min(12.0, 5.0 + 0.3 * classes)
    drawn = Figure(figsize=(side + 1.0, side), layout="compressed")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    image = axes.imshow(100 * shares, cmap=colormaps["Blues"], vmin=0, vmax=100, interpolation="nearest")
    drawn.colorbar(image, ax=axes, label="per cent of the class's images", shrink=0.8)
    axes.set_xlabel("put into class")
    axes.set_ylabel("class")
    if classes <= _MOST_NAMES:
        letters = class_letters(names)
        written: dict[str, Any] = {"fontfamily": letters.families, "parse_math": False}
        axes.set_xticks(range(classes), letters.texts, rotation=90, **written)
        axes.set_yticks(range(classes), letters.texts, **written)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if classes <= _MOST_NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            if share > 0:
                colour = "white" if share > 0.5 else "0.2"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=9)
    return drawn


def class_letters(names: Sequence[str]) -> Lettering:
    """How `confusion` writes the names of classes: as labels where no font has the letters, or the classes are many."""
    if len(names) > _MOST_NAMES:
        return Lettering([str(label) for label in range(len(names))], [], "")
    return _lettering(names, [str(label) for label in range(len(names))])


def _run_letters(names: Sequence[str] | Mapping[str, Any]) -> Lettering:
    return _lettering(list(names), [f"run {number}" for number in range(1, len(names) + 1)])


def _lettering(names: Sequence[str], stand_ins: Sequence[str]) -> Lettering:
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


def _draw(axes: Any, panel: _Panel, runs: Mapping[str, Mapping[str, Curve]], colours: Mapping[str, Any]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    columns = sorted({column for curves in runs.values() for column in _columns(panel, curves)})
    dashes = {column: _DASHES[i % len(_DASHES)] for i, column in enumerate(columns)}
    for name, curves in runs.items():
        for column in _columns(panel, curves):
            steps, values = zip(*curves[column], strict=True)
            few = len(steps) < 12
            axes.plot(
                steps,
                values,
                dashes[column],
                color=colours[name],
                linewidth=1.4,
                marker="o" if few else "",
                markersize=3,
            )
    axes.set_title(panel.title, fontsize=12)
    positive = all(value > 0 for curves in runs.values() for c in _columns(panel, curves) for _, value in curves[c])
    axes.set_xscale(panel.scale[0])
    axes.set_yscale(panel.scale[1] if positive else "linear")
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high < 100 * low else (1,)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9)
    if len(columns) > 1:
        told = [Line2D([], [], color="0.3", linestyle=dashes[c], label=_told(panel, c)) for c in columns]
        axes.legend(handles=told, fontsize=9)


def _columns(panel: _Panel, curves: Mapping[str, Curve]) -> list[str]:
    return [column for column in curves if re.fullmatch(panel.columns, column, re.ASCII)]


def _told(panel: _Panel, column: str) -> str:
    match = re.fullmatch(panel.columns, column, re.ASCII)
    return ((match and match[1]) or "all").replace("_", " ")


def _names(runs: Sequence[str]) -> list[str]:
    """The folders' own names, or as much of the paths as was given where those are not all different."""
    short = [Path(run).resolve().name for run in runs]
    return short if len(set(short)) == len(runs) else list(runs)
