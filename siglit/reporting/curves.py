"""Curves of one or several runs in one matplotlib figure.

Reads metrics.csv and knows the names of its columns; knows nothing of experiments.
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
"""(steps taken, value), by ascending step."""
_DPI = 100
_WIDTH_INCHES, _ROW_INCHES = 16.0, 2.7
_COLUMNS = 3
_DASHES = ("-", "--", ":", "-.")
_MAX_STEPS = 2**53
"""Larger integers are not exact as floats."""
_MAX_VALUE = 1e100
"""Larger than any logged float32, small enough that the axes do not overflow."""


@dataclass(frozen=True)
class _Panel:
    title: str
    columns: str
    """Regular expression of the columns that it shows; its first group is their name in the panel's legend."""
    scale: tuple[str, str] = ("linear", "linear")
    """Scales of the x and the y axis."""


_PANELS = (
    _Panel("loss", r"train/loss", ("log", "log")),
    _Panel("learning rate", r"train/lr"),
    _Panel("logit scale t", r"train/logit_scale"),
    _Panel("logit bias b", r"train/logit_bias"),
    _Panel("mean logit", r"train/(positive|negative)_logit"),
    _Panel("held-out R@1", r"val/(image_to_text|text_to_image)/R@1"),
    _Panel("gradient norm (before clipping)", r"train/(?:(\w+)/)?grad_norm", ("linear", "log")),
    _Panel("parameter norm", r"train/(\w+)/param_norm"),
    _Panel("update norm", r"train/(?:(\w+)/)?update_norm", ("linear", "log")),
    _Panel("examples/s", r"train/examples_per_second"),
    _Panel("MFU (fraction of peak FLOP/s)", r"train/mfu"),
    _Panel("fraction of step time", r"time/(\w+)", ("linear", "log")),
)


def save_png(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG; creates missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)


def read_metrics_csv(folder: Path) -> dict[str, Curve]:
    """{column: curve} of a run's metrics.csv, empty before its first logged step; non-finite values are left out.

    Raises:
        UserError: the folder has no metrics.csv, or it is not one that `siglit train` writes.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{path} does not exist; give output folders of `siglit train`")
    curves: dict[str, Curve] = {}
    line = 1
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file, strict=True):
                if None in row.values():  # still being written
                    continue
                step = int(row.pop("step")) + 1
                if not 1 <= step <= _MAX_STEPS:
                    raise ValueError(f"step {str(step - 1)[:20]}")
                for name, value in row.items():
                    if value and abs(float(value)) < _MAX_VALUE:
                        curves.setdefault(name, []).append((step, float(value)))
                line += 1
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        if isinstance(error, KeyError):
            reason = "it has no column step"
        elif isinstance(error, UnicodeDecodeError):
            reason = f"it is not UTF-8 at byte {error.start}"
        else:
            reason = f"after line {line}, {' '.join(str(error).split()).rpartition(': ')[2][:60]} is not a number of it"
        raise UserError(f"{path} is not the metrics.csv of a run: {reason}; restore it, or remove it") from error
    return {name: sorted(curve) for name, curve in curves.items()}


def draw_curves(runs: Mapping[str, Mapping[str, Curve]]) -> "Figure":
    """One panel per metric with the curves of all runs: a color per run, a line style per column.

    Args:
        runs: {name in the legend: {column: curve}}; panels that no run has columns for are left out.

    Raises:
        UserError: matplotlib is missing, or no run has any of the columns.
    """
    try:
        # Not pyplot, which needs a display and keeps global state.
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ModuleNotFoundError as error:
        raise UserError(f"siglit plot needs matplotlib ({error}); pip install 'siglit[plots]'") from error
    panels = [panel for panel in _PANELS if any(_columns(panel, curves) for curves in runs.values())]
    if len(panels) == 0:
        raise UserError(f"{', '.join(runs)}: metrics.csv has none of the columns that are plotted, such as train/loss")
    palette = colormaps["tab10" if len(runs) <= 10 else "turbo"]
    colors = {name: palette(i) if len(runs) <= 10 else palette(i / (len(runs) - 1)) for i, name in enumerate(runs)}
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(_WIDTH_INCHES, _ROW_INCHES * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for number, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(rows, _COLUMNS, number + 1), panel, runs, colors)
    letters = run_lettering(runs)
    entries = zip(letters.texts, colors.values(), strict=True)
    handles = [Line2D([], [], color=color, linewidth=3, label=text) for text, color in entries]
    font = {"family": letters.families, "size": 12}
    legend = figure.legend(
        handles=handles, loc="outside upper center", ncols=min(len(runs), 5), frameon=False, prop=font
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a name is a dollar sign
    return figure


def run_lettering(names: Sequence[str] | Mapping[str, Any]) -> Lettering:
    """The names of runs as the legend shows them."""
    return lettering(list(names), [f"run {number}" for number in range(1, len(names) + 1)])


def _draw_panel(axes: Any, panel: _Panel, runs: Mapping[str, Mapping[str, Curve]], colors: Mapping[str, Any]) -> None:
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
                color=colors[name],
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
        lines = [Line2D([], [], color="0.3", linestyle=dashes[c], label=_column_label(panel, c)) for c in columns]
        axes.legend(handles=lines, fontsize=9)


def _columns(panel: _Panel, curves: Mapping[str, Curve]) -> list[str]:
    return [column for column in curves if re.fullmatch(panel.columns, column, re.ASCII)]


def _column_label(panel: _Panel, column: str) -> str:
    match = re.fullmatch(panel.columns, column, re.ASCII)
    return ((match and match[1]) or "all").replace("_", " ")
