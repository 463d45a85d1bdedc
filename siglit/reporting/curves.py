"""Curves of one or several runs as one matplotlib figure.

Reads metrics.csv and knows the names of its columns.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siglit.errors import UserError
from siglit.reporting.fonts import Lettering, lettering

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
    _Panel("share of the hardware's peak", r"train/mfu"),
    _Panel("share of a step's time", r"time/(\w+)", ("linear", "log")),
)


def save_png(drawn: "Figure", path: Path) -> None:
    """Write a picture as PNG, with the folders that lead there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=_DPI)


def read_metrics_csv(folder: Path) -> dict[str, Curve]:
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


def draw_curves(runs: Mapping[str, Mapping[str, Curve]]) -> "Figure":
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
    letters = run_lettering(runs)
    named = zip(letters.texts, colours.values(), strict=True)
    handles = [Line2D([], [], color=colour, linewidth=3, label=text) for text, colour in named]
    font = {"family": letters.families, "size": 12}
    legend = drawn.legend(
        handles=handles, loc="outside upper center", ncols=min(len(runs), 5), frameon=False, prop=font
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a name is a dollar
    return drawn


def run_lettering(names: Sequence[str] | Mapping[str, Any]) -> Lettering:
    """How a legend writes the names of runs."""
    return lettering(list(names), [f"run {number}" for number in range(1, len(names) + 1)])


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
