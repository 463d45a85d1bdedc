"""Pictures of a study: each measure over the arms, and curves over training where the records have them.

A measure is drawn over the axis whose points are numbers, such as batch sizes, with a line for each combination of the
other axes; without such an axis, each arm is a row. Bars are the standard deviation over seeds, faint dots the seeds.
Knows nothing of verdicts and pages.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from siglit.errors import UserError
from siglit.reporting.fonts import Lettering, lettering
from siglit.studies import statistics
from siglit.studies.findings import Arm, Findings, Measure, is_fraction


@dataclass(frozen=True)
class Colors:
    """Of everything that is not data."""

    ink: str
    paper: str


LIGHT, DARK = Colors("#1c2127", "#ffffff"), Colors("#e7e9eb", "#1a1e23")
"""For a light and for a dark page: ink and card of page.css."""
_WIDTH_INCHES, _HEIGHT_INCHES, _DPI, _PALETTE = 5.6, 4.0, 110, 256
_ROW_INCHES, _LEGEND_ROW_INCHES = 0.32, 0.24
_MARKERS = "os^DvPX*"
_DASHES = ("-", "--", ":", "-.")
_LOG_FROM = 8
"""A numeric axis whose largest point is at least so many times its smallest is logarithmic."""
_MAX_CURVES = 6
"""Curves of more arms than these are drawn in a panel for each point of the axis with the most points."""
_LABEL_LETTERS = 22
"""Longer names of rows are broken into lines."""
_SUFFIXES = {"": 1.0, "%": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}


@dataclass(frozen=True)
class _Line:
    """Arms in one color, with their places along the axis of the arms."""

    label: str
    places: list[float]
    arms: list[Arm]


@dataclass(frozen=True)
class _Layout:
    lines: list[_Line]
    axis: str
    """Name of the numeric axis; empty: each arm is a row."""
    ticks: dict[float, str]


@dataclass(frozen=True)
class Panel:
    """One drawing; `draw` fills an empty matplotlib figure or subfigure in the given ink."""

    title: str
    height: float
    """Inches."""
    draw: Callable[[Any, str], None]


def number(text: str) -> float | None:
    """64, 4,096, 30 %, 1e-3, 24K as a number; None for other names."""
    match = re.fullmatch(r"([-+]?[\d.]+(?:e[-+]?\d+)?) ?([%kKMGB]?)", text.strip().replace(",", ""))
    try:
        return float(match[1]) * _SUFFIXES[match[2]] if match else None
    except ValueError:  # such as 1.2.3
        return None


def panels(findings: Findings) -> list[Panel]:
    """A panel for each measure that has values, then one for each curve.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"the plots of a study need matplotlib ({error}); pip install 'siglit[plots]'") from error
    arms = [arm for arm in findings.arms if len(arm.finals) > 0]
    layout = _arrange(findings.study.axes, arms)
    labels = [line.label for line in layout.lines]  # a single one without a name needs no legend
    letters = lettering(labels, [f"line {i + 1}" if label else "" for i, label in enumerate(labels)])
    text_rows = sum(map(_text_rows, layout.ticks.values()))
    height = _HEIGHT_INCHES if layout.axis else 1.3 + _ROW_INCHES * text_rows
    height += _legend_inches(letters.texts)
    found = []
    for measure in findings.measures:
        if any(arm.values(measure) for arm in arms):
            found.append(Panel(_label(measure), height, _measure_drawer(measure, layout, letters)))
    columns = {column for arm in arms for record in arm.finals.values() for column in record.curves}
    for column in sorted(columns - {"step", "kept/step"}):
        found += _curve_panels(column, findings.study.axes, arms)
    return found


def draw_png(drawn: Sequence[Panel], colors: Colors, columns: int = 1) -> bytes:
    """Panels as one PNG of at most 256 colors, half of the bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(drawn))
    rows = [list(drawn[start : start + columns]) for start in range(0, len(drawn), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    figure = Figure(figsize=(_WIDTH_INCHES * columns, sum(heights)), layout="constrained", dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    figure.set_facecolor(colors.paper)
    cells = figure.subfigures(len(rows), columns, squeeze=False, height_ratios=heights)
    for cell in cells.flat:
        cell.set_facecolor(colors.paper)
    for cell, panel in zip(cells.flat, drawn, strict=False):
        panel.draw(cell, colors.ink)
    canvas.draw()
    buffer = io.BytesIO()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(_PALETTE, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _arrange(axes: Mapping[str, Mapping[str, Any]], arms: Sequence[Arm]) -> _Layout:
    """Places along the numeric axis with the most points; else a row for each combination of all axes but the last."""
    numeric = [axis for axis, points in axes.items() if all(number(point) is not None for point in points)]
    numeric = [axis for axis in numeric if len(axes[axis]) > 1]
    if len(numeric) > 0:
        along = max(numeric, key=lambda axis: len(axes[axis]))
        lines = _group(arms, lambda arm: _without(arm, along), lambda arm: float(number(arm.points[along]) or 0))
        return _Layout(lines, along, {float(number(point) or 0): point for point in axes[along]})
    last = list(axes)[-1] if len(axes) > 1 else ""
    rows = {name: float(-i) for i, name in enumerate(dict.fromkeys(_without(arm, last) for arm in arms))}
    lines = _group(arms, lambda arm: arm.points.get(last, ""), lambda arm: rows[_without(arm, last)])
    return _Layout(lines, "", {place: name for name, place in rows.items()})


def _group(arms: Sequence[Arm], label: Callable[[Arm], str], place: Callable[[Arm], float]) -> list[_Line]:
    lines: dict[str, _Line] = {}
    for arm in sorted(arms, key=place):
        line = lines.setdefault(label(arm), _Line(label(arm), [], []))
        line.places.append(place(arm))
        line.arms.append(arm)
    order = list(dict.fromkeys(map(label, arms)))
    return [lines[name] for name in order]


def _without(arm: Arm, axis: str) -> str:
    return ", ".join(point for name, point in arm.points.items() if name != axis)


def _text_rows(name: str) -> int:
    return len(textwrap.wrap(name[:40], _LABEL_LETTERS)) or 1


def _label(measure: Measure) -> str:
    return f"{measure.name}, %" if measure.percent else measure.name


def _legend_inches(labels: Sequence[str]) -> float:
    return 0.2 + _LEGEND_ROW_INCHES * math.ceil(len(labels) / _legend_columns(labels)) if any(labels) else 0.0


def _legend_columns(labels: Sequence[str]) -> int:
    return max(1, min(3, len(labels), 52 // (max(map(len, labels)) + 5))) if len(labels) > 0 else 1


def _measure_drawer(measure: Measure, layout: _Layout, letters: Lettering) -> Callable[[Any, str], None]:
    def draw(figure: Any, ink: str) -> None:
        axes = figure.add_subplot()
        factor = 100.0 if measure.percent else 1.0
        log = bool(layout.axis) and min(layout.ticks) > 0 and max(layout.ticks) >= _LOG_FROM * min(layout.ticks)
        span = math.log(max(layout.ticks) / min(layout.ticks)) if log else max(layout.ticks) - min(layout.ticks)
        gap = 0.012 * span if layout.axis else 0.7 / max(3, len(layout.lines))
        for i, (line, text) in enumerate(zip(layout.lines, letters.texts, strict=True)):
            shift = gap * (i - (len(layout.lines) - 1) / 2)  # so that the bars of lines do not cover each other
            shift = shift if layout.axis else -shift
            style = {"color": f"C{i % 10}", "marker": _MARKERS[i % len(_MARKERS)]}
            means, spreads, places = [], [], []
            for place, arm in zip(line.places, line.arms, strict=True):
                values = [factor * value for value in arm.values(measure).values()]
                if len(values) == 0:
                    continue
                at = place * math.exp(shift) if log else place + shift
                along = ([at] * len(values), values)
                axes.plot(*(along if layout.axis else along[::-1]), **style, linestyle="", markersize=4, alpha=0.3)
                places.append(at)
                means.append(statistics.mean(values))
                spreads.append(statistics.sample_sd(values) if len(values) > 1 else 0.0)
            if layout.axis:
                axes.errorbar(places, means, yerr=spreads, **style, label=text, markersize=5, capsize=3, linewidth=1.4)
            else:
                axes.errorbar(means, places, xerr=spreads, **style, label=text, markersize=6, capsize=3, linestyle="")
        _label_axes(axes, layout, log, letters)
        _finish(figure, axes, _label(measure), letters, ink)

    return draw


def _label_axes(axes: Any, layout: _Layout, log: bool, letters: Lettering) -> None:
    from matplotlib.ticker import NullLocator

    names = lettering(list(layout.ticks.values()), [str(i + 1) for i in range(len(layout.ticks))])
    style = {"fontfamily": names.families, "parse_math": False}
    if layout.axis:
        axes.set_xscale("log" if log else "linear")
        axes.set_xticks(list(layout.ticks), names.texts, **style)
        axes.xaxis.set_minor_locator(NullLocator())
        name = lettering([layout.axis], ["axis"])
        axes.set_xlabel(name.texts[0], fontfamily=name.families, parse_math=False)
    else:
        axes.set_yticks(list(layout.ticks), [textwrap.fill(name, _LABEL_LETTERS) for name in names.texts], **style)
        axes.set_ylim(min(layout.ticks) - 0.6, max(layout.ticks) + 0.6)


def _curve_panels(column: str, axes: Mapping[str, Mapping[str, Any]], arms: Sequence[Arm]) -> list[Panel]:
    """One panel, or if the arms are many, one for each point of the axis with the most points, all of one scale."""
    curves = [(arm, curve) for arm in arms if len(curve := _curve(arm, column)) > 0]
    if len(curves) == 0:
        return []
    values = [value for _, curve in curves for at in curve.values() for value in at]
    factor = 100.0 if is_fraction(column.removeprefix("kept/")) else 1.0
    limits = factor * min(values), factor * max(values)
    title = f"{column}, %" if factor > 1 else column
    if len(curves) <= _MAX_CURVES or len(axes) == 1:
        return [_curve_panel(title, factor, limits, {arm.title: curve for arm, curve in curves})]
    split = max(axes, key=lambda axis: len(axes[axis]))
    parts: dict[str, dict[str, dict[float, list[float]]]] = {}
    for arm, curve in curves:
        parts.setdefault(arm.points[split], {})[_without(arm, split)] = curve
    return [_curve_panel(f"{title} · {split} {point}", factor, limits, part) for point, part in parts.items()]


def _curve(arm: Arm, column: str) -> dict[float, list[float]]:
    """{step: a value of each seed}, at the steps that all seeds of the arm have."""
    seeds = []
    for record in arm.finals.values():
        steps = record.curves.get("kept/step" if column.startswith("kept/") else "step", [])
        points = zip(steps, record.curves.get(column, []), strict=False)
        if record.failed is None:
            known = {step: value for step, value in points if step is not None and value is not None}
            seeds.append({step: value for step, value in known.items() if math.isfinite(value)})
    seeds = [points for points in seeds if len(points) > 0]
    common = sorted(set.intersection(*map(set, seeds))) if len(seeds) > 0 else []
    return {step: [points[step] for points in seeds] for step in common}


def _curve_panel(
    title: str, factor: float, limits: tuple[float, float], curves: Mapping[str, Mapping[float, list[float]]]
) -> Panel:
    letters = lettering(list(curves), [f"arm {i + 1}" for i in range(len(curves))])

    def draw(figure: Any, ink: str) -> None:
        axes = figure.add_subplot()
        for i, (text, curve) in enumerate(zip(letters.texts, curves.values(), strict=True)):
            steps, color = list(curve), f"C{i % 10}"
            means = [factor * statistics.mean(values) for values in curve.values()]
            style = {"linestyle": _DASHES[i % len(_DASHES)], "marker": "o" if len(steps) < 12 else ""}
            axes.plot(steps, means, color=color, label=text, linewidth=1.4, markersize=4, **style)
            lowest, highest = ([factor * pick(values) for values in curve.values()] for pick in (min, max))
            axes.fill_between(steps, lowest, highest, color=color, alpha=0.18, linewidth=0)
        _scale(axes, *limits)
        axes.set_xlabel("step")
        _finish(figure, axes, title, letters, ink)

    return Panel(title, _HEIGHT_INCHES + _legend_inches(letters.texts), draw)


def _scale(axes: Any, low: float, high: float) -> None:
    """A y axis that holds all of low … high, logarithmic if they are far apart."""
    from matplotlib.ticker import LogLocator, NullLocator

    if 0 < 20 * low < high:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, high * 1.1)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        margin = 0.05 * (high - low) or 0.1 * abs(low) or 1.0
        axes.set_ylim(low - margin, high + margin)


def _finish(figure: Any, axes: Any, title: str, letters: Lettering, ink: str) -> None:
    """Title, legend below, and everything that is not data in the ink of the page."""
    name = lettering([title], [""])
    axes.set_title(name.texts[0], fontsize=12, fontfamily=name.families, color=ink, parse_math=False)
    axes.grid(alpha=0.25, color=ink)
    axes.set_facecolor("none")
    axes.tick_params(which="both", colors=ink)
    axes.xaxis.label.set_color(ink)
    for spine in axes.spines.values():
        spine.set_color(ink)
    if any(letters.texts):
        legend = figure.legend(
            loc="outside lower center",
            ncols=_legend_columns(letters.texts),
            frameon=False,
            labelcolor=ink,
            prop={"family": letters.families, "size": 10},
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
