"""Numbers to SVG: curves, a histogram of logits and a reliability diagram, for the page of `siglit report`.

Pure: strings out, no files. Colors are CSS classes (s0, s1, … for series, axis, grid, mark) that the page's style sheet
defines for light and dark. Drawings are as wide as a phone; a page may scale them up.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Points = Sequence[tuple[float, float]]
"""(x, y), x ascending."""

_MAX_POINTS = 400
_LOWEST, _HIGHEST = 1e-9, 1 - 1e-4
"""Probabilities outside are drawn at the border."""


@dataclass(frozen=True)
class _Canvas:
    """A drawing and the frame of its axes, in the units of its view box."""

    width: float
    height: float
    left: float
    top: float = 10.0

    @property
    def right(self) -> float:
        return self.width - 10

    @property
    def bottom(self) -> float:
        return self.height - 38


_SMALL, _LARGE = _Canvas(320, 204, 46), _Canvas(380, 240, 62)


@dataclass(frozen=True)
class _Axis:
    """Maps values to coordinates of the drawing, along x or y."""

    low: float
    high: float
    """Ends of the axis, as scaled values."""
    ticks: list[tuple[float, str]]
    """Values and their labels."""
    scale: Callable[[float], float] = float
    """From values to scaled values, such as log10."""
    start: float = 0.0
    end: float = 1.0
    """Coordinates of low and high."""

    def coordinate(self, value: float) -> float:
        share = (self.scale(value) - self.low) / (self.high - self.low)
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 1)


def curves(title: str, series: Mapping[str, Points], *, log: bool = False) -> str:
    """Lines of values by step, with the points as JSON in `data-curve` for the read-out.

    Args:
        title: part of the accessible label.
        series: {name: points}; points that are not finite are left out.
        log: logarithmic y axis, if all values are above 0.
    """
    finite = {name: [p for p in points if _finite(p)] for name, points in series.items()}
    finite = {name: _thinned(points) for name, points in finite.items() if points}
    if len(finite) == 0:
        return _empty(_SMALL, title)
    xs = [x for points in finite.values() for x, _ in points]
    ys = [y for points in finite.values() for _, y in points]
    x_axis = _linear(min(xs), max(xs), _SMALL.left, _SMALL.right, max_ticks=5, min_step=1.0)
    span = _SMALL.bottom, _SMALL.top
    y_axis = _logarithmic(min(ys), max(ys), *span) if log and min(ys) > 0 else _linear(min(ys), max(ys), *span)
    parts = [_frame(x_axis, y_axis, "step")]
    data: dict[str, Any] = {"series": []}
    for number, (name, points) in enumerate(finite.items()):
        drawn = [(x_axis.coordinate(x), y_axis.coordinate(y)) for x, y in points]
        parts.append(_polyline(drawn, f"line s{number}"))
        if len(drawn) == 1:
            parts.append(f'<circle class="dot s{number}" cx="{drawn[0][0]}" cy="{drawn[0][1]}" r="3"/>')
        rows = [[x, float(f"{y:.5g}"), *xy] for (x, y), xy in zip(points, drawn, strict=True)]
        data["series"].append({"name": name, "points": rows})
    last = "; ".join(f"{name} ends at {points[-1][1]:.4g}" for name, points in finite.items())
    return _svg(_SMALL, f"{title}, by step: {last}", "".join(parts), f' data-curve="{escape(json.dumps(data))}"')


def histogram(title: str, edges: Sequence[float], positive: Sequence[float], negative: Sequence[float]) -> str:
    """Densities of the logits of positives (s0) and negatives (s1) on a logarithmic scale, with a line at logit 0."""
    densities = [(1, _density(edges, negative)), (0, _density(edges, positive))]
    nonzero = [value for _, density in densities for value in density if value > 0]
    if len(nonzero) == 0:
        return _empty(_LARGE, title)
    x_axis = _linear(min(0.0, edges[0]), max(0.0, edges[-1]), _LARGE.left, _LARGE.right)
    y_axis = _logarithmic(min(nonzero) / 2, max(nonzero), _LARGE.bottom, _LARGE.top)
    parts = [_frame(x_axis, y_axis, "logit", "density")]
    floor = _LARGE.bottom
    for number, density in densities:
        steps = []
        for (low, high), value in zip(itertools.pairwise(edges), density, strict=True):
            height = y_axis.coordinate(value) if value > 0 else floor
            steps += [(x_axis.coordinate(low), height), (x_axis.coordinate(high), height)]
        outline = [(steps[0][0], floor), *steps, (steps[-1][0], floor)]
        parts.append(_polyline(outline, f"area s{number}"))
    zero = x_axis.coordinate(0)
    parts.append(f'<line class="mark" x1="{zero}" x2="{zero}" y1="{_LARGE.top}" y2="{floor}"/>')
    return _svg(_LARGE, title, "".join(parts))


def reliability(title: str, bins: Sequence[Mapping[str, float]]) -> str:
    """Observed share of positives by predicted probability, both as log odds; calibrated bins are on the diagonal.

    Args:
        title: the accessible label.
        bins: each with "predicted" and "observed"; bins that are not finite are left out.
    """
    points = [(float(b["predicted"]), float(b["observed"])) for b in bins]
    points = [point for point in points if _finite(point)]
    if len(points) == 0:
        return _empty(_LARGE, title)
    inside = [p for point in points for p in point if _LOWEST < p < _HIGHEST]
    low, high = min([0.1, *inside]), max([0.9, *inside])
    x_axis = _odds(low, high, _LARGE.left, _LARGE.right)
    y_axis = _odds(low, high, _LARGE.bottom, _LARGE.top)
    ends = [(axis.start, axis.end) for axis in (x_axis, y_axis)]
    drawn = [(x_axis.coordinate(x), y_axis.coordinate(y)) for x, y in points]
    parts = [
        _frame(x_axis, y_axis, "predicted probability", "observed share"),
        f'<line class="mark" x1="{ends[0][0]}" y1="{ends[1][0]}" x2="{ends[0][1]}" y2="{ends[1][1]}"/>',
        _polyline(drawn, "line s0"),
    ]
    for (x, y), (predicted, observed) in zip(drawn, points, strict=True):
        label = f"predicted {predicted:.3g}, observed {observed:.3g}"
        parts.append(f'<circle class="dot s0" cx="{x}" cy="{y}" r="3.5"><title>{label}</title></circle>')
    return _svg(_LARGE, title, "".join(parts))


def _finite(point: Sequence[float]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in point)


def _density(edges: Sequence[float], counts: Sequence[float]) -> list[float]:
    total = sum(counts)
    widths = [high - low for low, high in itertools.pairwise(edges)]
    return [count / total / width if total else 0.0 for count, width in zip(counts, widths, strict=True)]


def _thinned(points: Points) -> list[tuple[float, float]]:
    """At most `_MAX_POINTS`: minimum and maximum of each stretch, so that spikes remain, and both end points."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    stretch = -(-2 * len(points) // (_MAX_POINTS - 2))
    kept = set()
    for start in range(0, len(points), stretch):
        part = range(start, min(start + stretch, len(points)))
        kept |= {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept | {0, len(points) - 1})]


def _linear(low: float, high: float, start: float, end: float, max_ticks: int = 6, min_step: float = 0.0) -> _Axis:
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-12):
        margin = 0.1 * abs(low) or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / max_ticks
    unit = 10.0 ** math.floor(math.log10(rough))
    step = max(min_step, next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * (1 - 1e-9)))
    first = math.ceil(low / step - 1e-9)
    values = [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return _Axis(low, high, [(v, format_tick(v, digits)) for v in values], float, start, end)


def _logarithmic(low: float, high: float, start: float, end: float) -> _Axis:
    if high <= low * (1 + 1e-9):
        low, high = low / 2, high * 2
    bottom, top = math.log10(low), math.log10(high)
    decades = range(math.floor(bottom), math.ceil(top) + 1)
    every = max(1, len(decades) // 6)
    factors = (1, 2, 5) if top - bottom < 2 else (1,)
    values = [f * 10.0**decade for decade in decades if decade % every == 0 for f in factors]
    values = [v for v in values if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
    if len(values) < 2:
        ticks = _linear(low, high, start, end, max_ticks=4).ticks
        return _Axis(bottom, top, ticks, math.log10, start, end)
    return _Axis(bottom, top, [(v, format_tick(v)) for v in values], math.log10, start, end)


def _odds(low: float, high: float, start: float, end: float) -> _Axis:
    below = [(10.0**-n, f"{10.0**-n:g}") for n in range(9, 0, -1)]
    above = [(1 - 10.0**-n, f"{1 - 10.0**-n:g}") for n in range(1, 5)]
    kept = [(p, text) for p, text in [*below, (0.5, "0.5"), *above] if low * 0.999 <= p <= 1 - (1 - high) * 0.999]
    every = -(-len(kept) // 7)
    half = next(i for i, (p, _) in enumerate(kept) if p == 0.5)
    ticks = [tick for i, tick in enumerate(kept) if (i - half) % every == 0]
    return _Axis(_log_odds(low), _log_odds(high), ticks, _log_odds, start, end)


def _log_odds(p: float) -> float:
    p = min(_HIGHEST, max(_LOWEST, p))
    return math.log(p / (1 - p))


def format_tick(value: float, digits: int | None = None) -> str:
    """Label of a tick: 12k, 0.05, 1e-5; with `digits` decimals between 0.001 and 1000."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        unit, letter = next((u, c) for u, c in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= u)
        return f"{value / unit:.6g}{letter}"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if digits is None else f"{value:.{digits}f}"


def _frame(x_axis: _Axis, y_axis: _Axis, x_name: str, y_name: str = "") -> str:
    left, bottom = x_axis.start, y_axis.start
    parts = []
    for value, text in y_axis.ticks:
        y = y_axis.coordinate(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{x_axis.end}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{left - 5}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for value, text in x_axis.ticks:
        x = x_axis.coordinate(value)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 15}" text-anchor="middle">{text}</text>')
    middle = (left + x_axis.end) / 2
    parts.append(f'<line class="axis" x1="{left}" x2="{x_axis.end}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="tick" x="{middle}" y="{bottom + 31}" text-anchor="middle">{x_name}</text>')
    if y_name:
        up = (bottom + y_axis.end) / 2
        parts.append(
            f'<text class="tick" transform="translate(9 {up}) rotate(-90)" text-anchor="middle">{y_name}</text>'
        )
    return "".join(parts)


def _polyline(points: Points, css_class: str) -> str:
    return f'<polyline class="{css_class}" points="{" ".join(f"{x:g},{y:g}" for x, y in points)}"/>'


def _empty(canvas: _Canvas, title: str) -> str:
    middle = f'x="{canvas.width / 2:g}" y="{canvas.height / 2:g}"'
    return _svg(canvas, f"{title}: no data", f'<text class="tick" {middle} text-anchor="middle">no data</text>')


def _svg(canvas: _Canvas, title: str, content: str, attributes: str = "") -> str:
    box, label = f"0 0 {canvas.width:g} {canvas.height:g}", escape(title)
    return f'<svg viewBox="{box}" role="img" aria-label="{label}"{attributes}>{content}</svg>'
