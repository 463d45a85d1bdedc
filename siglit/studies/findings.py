"""What the records of a study say: values by arm and seed, contrasts, verdicts, and which runs are missing.

Knows nothing of files, tables or pictures.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from siglit.studies import definition, statistics
from siglit.studies.definition import Expectation, Study, matches, slug
from siglit.studies.grid import Progress, progress
from siglit.studies.records import Record
from siglit.studies.statistics import BySeed, Estimate

_FRACTION = re.compile(r".*/(R@\d+|mAP@\d+|top\d+|mean_per_class)|zeroshot/per_class/.*|fewshot/(.*/)?(mean|\d+)")


@dataclass(frozen=True)
class Measure:
    """A measure of the study, and how its values are shown."""

    name: str
    paths: Sequence[str]
    """Keys of a record's results; the measure is their mean."""

    @property
    def percent(self) -> bool:
        """Whether it is a fraction, such as R@K or accuracy."""
        return all(is_fraction(path) for path in self.paths)


@dataclass
class Arm:
    """One cell of the grid with what was measured for it."""

    points: definition.Arm
    learning_rate: float | None = None
    """Chosen on val from the grid; None while the grid is incomplete, or if the experiment sets it."""
    grid: dict[float, float | None] = field(default_factory=dict)
    """{learning rate: first measure on val}; None: the training failed."""
    finals: dict[int, Record] = field(default_factory=dict)
    """{seed: record}, with failed ones."""

    @property
    def title(self) -> str:
        """The points in one line."""
        return ", ".join(self.points.values())

    def values(self, measure: Measure) -> dict[int, float]:
        """{seed: value}, without failed trainings."""
        found = {seed: record.measure(measure.paths) for seed, record in self.finals.items() if record.failed is None}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Contrast:
    """An expectation with the contrast that was measured."""

    expectation: Expectation
    measure: Measure
    by_seed: BySeed
    estimate: Estimate
    verdict: str


@dataclass
class Findings:
    """All that the page of a study shows."""

    study: Study
    measures: list[Measure]
    arms: list[Arm]
    used: list[Record]
    """Records that count, of both stages."""
    total: int
    """Runs of the complete study."""
    contrasts: list[Contrast] = field(default_factory=list)
    verdict: str = statistics.INCOMPLETE
    missing: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def at_edge(self) -> list[Arm]:
        """Arms whose learning rate is the lowest or the highest of the grid: a better one may lie outside."""
        return [arm for arm in self.arms if len(arm.grid) > 1 and arm.learning_rate in (min(arm.grid), max(arm.grid))]


def is_fraction(path: str) -> bool:
    """Whether a result is a fraction of queries or images, to be shown in percent."""
    return _FRACTION.fullmatch(path) is not None


def find(study: Study, records: Sequence[Record]) -> Findings:
    """Sort the records of a study into arms, and derive contrasts and verdicts.

    Records of an earlier form of the study are named as stale and left out.
    """
    state = progress(study, records)
    measures = [Measure(name, paths) for name, paths in study.measures.items()]
    arms = [Arm(points, state.learning_rates.get(slug(points))) for points in study.arms()]
    by_slug = {slug(arm.points): arm for arm in arms}
    for record in state.records:
        arm = by_slug[slug(record.arm)]
        if record.stage == "final":
            arm.finals[record.seed] = record
        elif record.learning_rate is not None:
            failed = record.failed is not None
            arm.grid[record.learning_rate] = None if failed else record.measure(measures[0].paths)
    findings = Findings(study, measures, arms, state.records, state.total)
    findings.contrasts = [_contrast(findings, expectation) for expectation in study.expect]
    findings.missing = [line for arm in arms if (line := _missing(state, arm))]
    findings.stale = [f"{_name(record)}: {_reason(state, record)}" for record in state.stale]
    findings.failed = [f"{_name(record)}: {record.failed}" for record in state.records if record.failed is not None]
    verdicts = [found.verdict for found in findings.contrasts]
    findings.verdict = statistics.study_verdict(verdicts, complete=len(findings.missing) == 0)
    return findings


def _missing(state: Progress, arm: Arm) -> str:
    """The runs that an arm lacks, in one line; empty if it has all."""
    runs = [run for run in state.missing if run.arm == arm.points]
    lacking = [f"learning rate {run.learning_rate:g} on val" for run in runs if run.stage == "select"]
    lacking += [f"seed {run.seed}" for run in runs if run.stage == "final"]
    if slug(arm.points) not in state.learning_rates:
        lacking.append("all final runs")
    return f"{arm.title}: {', '.join(lacking)}" if len(lacking) > 0 else ""


def _reason(state: Progress, record: Record) -> str:
    """Why a record does not count."""
    if slug(record.arm) in {slug(run.arm) for run in state.missing if run.stage == "select"}:
        return "its arm has not chosen a learning rate yet"
    chosen = state.learning_rates.get(slug(record.arm))
    if record.stage == "final" and chosen not in (None, record.learning_rate):
        return f"val has chosen the learning rate {chosen:g}"
    return "the study has changed since"


def _name(record: Record) -> str:
    rate = "" if record.learning_rate is None else f", learning rate {record.learning_rate:g}"
    return f"{', '.join(record.arm.values())}, {record.stage}{rate}, seed {record.seed}"


def _contrast(findings: Findings, expectation: Expectation) -> Contrast:
    measure = next(measure for measure in findings.measures if measure.name == expectation.measure)

    def terms(selectors: Sequence[Mapping[str, str]]) -> list[list[BySeed]]:
        return [
            [arm.values(measure) for arm in findings.arms if matches(arm.points, selector)] for selector in selectors
        ]

    by_seed = statistics.contrast(terms(expectation.plus), terms(expectation.minus))
    found = statistics.estimate(by_seed.values())
    return Contrast(expectation, measure, by_seed, found, statistics.verdict(found, expectation.margin))
