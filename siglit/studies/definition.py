"""A study: what is compared, over which seeds and learning rates, and how its claim is decided."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Arm = dict[str, str]
"""{axis: point}."""

_RESERVED = ("base", "test")


@dataclass(frozen=True)
class Expectation:
    """What the claim predicts of a contrast between arms, which the paired seeds decide."""

    say: str
    """The prediction in words, such as "ahead of softmax at a batch of 64"."""
    plus: tuple[Arm, ...]
    """Selectors; each stands for the mean over the arms that have all of its points."""
    minus: tuple[Arm, ...]
    """Selectors that are subtracted."""
    measure: str
    """Name of one of the study's measures."""
    margin: float = 0.0
    """The contrast, sum of plus minus sum of minus, is predicted to be greater than this."""


@dataclass(frozen=True)
class Paper:
    """The paper's numbers that the page shows."""

    table: Path | None = None
    """CSV in long form; its last columns are `metric` and `value`."""
    note: str = ""
    recipe: Path | None = None
    """Experiment file of the paper's own scale, which `siglit study plan` plans too."""


@dataclass(frozen=True)
class Study:
    """A study file, checked."""

    path: Path
    name: str
    title: str
    claim: str
    """What the paper (or the project) says, in one sentence."""
    source: str
    """Where it says so: paper, figure, table, section."""
    base: Path
    """The experiment file that the runs start from."""
    axes: dict[str, dict[str, dict[str, Any]]]
    """{axis: {point: {dotted field: value}}}; a point may also have `base`, another experiment file, and `test`."""
    measures: dict[str, tuple[str, ...]]
    """{name: paths of results, of which it is the mean}; of the first one, more is better, and it chooses the learning
    rate."""
    expect: tuple[Expectation, ...]
    set: dict[str, Any] = field(default_factory=dict)
    """Fields of all runs, over the base's."""
    test: dict[str, Any] = field(default_factory=dict)
    """Fields of the evaluation that reads the test split, over those of the run; empty: final runs are evaluated on
    data.val."""
    exclude: tuple[Arm, ...] = ()
    """Selectors of the arms that are left out."""
    seeds: int = 5
    learning_rates: tuple[float, ...] = ()
    """optim.lr of the grid, from which each arm's is chosen on data.val; empty: that of the experiment."""
    evaluate: tuple[str, ...] = ("eval-retrieval",)
    kept: tuple[str, ...] = ()
    """Evaluations of each checkpoint that train.keep_every keeps."""
    curves: tuple[str, ...] = ()
    """Columns of metrics.csv that the records keep."""
    paper: Paper = Paper()
    notes: str = ""
    """Prose for the page."""
    full: dict[str, Any] = field(default_factory=dict)
    """Fields of --full, over all others."""

    def arms(self) -> list[Arm]:
        """All combinations of the axes' points, in the file's order, without those that are excluded."""
        crossed = itertools.product(*(points for points in self.axes.values()))
        arms = [dict(zip(self.axes, points, strict=True)) for points in crossed]
        return [arm for arm in arms if not any(matches(arm, selector) for selector in self.exclude)]

    def base_of(self, arm: Arm) -> Path:
        """The experiment file of an arm's runs."""
        bases = [point["base"] for point in self._points(arm) if "base" in point]
        return self.path.parent / bases[-1] if len(bases) > 0 else self.base

    def fields_of(self, arm: Arm) -> dict[str, Any]:
        """{dotted field: value} of an arm's runs, over its base's."""
        points = [
            {name: value for name, value in point.items() if name not in _RESERVED} for point in self._points(arm)
        ]
        return _merged(self.set, *points, self.full)

    def test_of(self, arm: Arm) -> dict[str, Any]:
        """{dotted field: value} of the evaluation of an arm's final runs, over `fields_of`."""
        return _merged(self.test, *(point.get("test", {}) for point in self._points(arm)))

    def _points(self, arm: Arm) -> list[dict[str, Any]]:
        return [self.axes[axis][point] for axis, point in arm.items()]


def matches(arm: Arm, selector: Mapping[str, str]) -> bool:
    """Whether the arm has all of the selector's points."""
    return all(arm.get(axis) == point for axis, point in selector.items())


def slug(arm: Arm) -> str:
    """The arm as a part of a file's name: letters, digits and `.+_%-` alone."""
    parts = (f"{axis}-{point}" for axis, point in arm.items())
    return ".".join(re.sub(r"[^A-Za-z0-9.+_%-]+", "-", part).strip("-") for part in parts) or "all"


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= part
    return merged
