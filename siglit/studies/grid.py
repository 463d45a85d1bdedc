"""The runs of a study: which there are, which records are theirs, and which learning rate an arm has chosen.

Knows neither how a run is trained nor where.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from siglit.parsing.yaml_checks import read_mapping
from siglit.studies.definition import Arm, Study, slug
from siglit.studies.records import SELECTION_SEED, Record, Stage, canonical, record_path

_NOT_IN_DIGEST = ("name", "output_dir", "cache.path")
"""Names of things; what they hold is in the other fields."""


@dataclass(frozen=True)
class Run:
    """One run of a study."""

    arm: Arm
    stage: Stage
    seed: int
    learning_rate: float | None
    base: Path
    fields: dict[str, Any]
    """{dotted field: value} over the base's, seed and learning rate included."""
    test: dict[str, Any]
    """Those of the evaluation, over `fields`; empty for stage select, which is evaluated on data.val."""
    digest: str

    @property
    def folder(self) -> str:
        """Name of the run's folder, another one if the experiment changes."""
        rate = "" if self.learning_rate is None else f".lr{self.learning_rate:g}"
        return f"{slug(self.arm)}{rate}.s{self.seed}-{self.digest[:8]}"

    def __str__(self) -> str:
        """Such as "loss softmax, batch 64, lr 0.003, seed 0"."""
        parts = [f"{axis} {point}" for axis, point in self.arm.items()]
        parts += [] if self.learning_rate is None else [f"lr {self.learning_rate:g}"]
        return ", ".join([*parts, f"seed {self.seed}"])


@dataclass(frozen=True)
class Progress:
    """What of a study is there."""

    records: list[Record]
    """Of the study as it is now, of both stages."""
    missing: list[Run]
    """Runs that have no record, as far as they are known: an arm's final runs follow from its selection."""
    unknown: int
    """Final runs that are not known yet, because their arm has not chosen its learning rate."""
    stale: list[Record]
    """Records of an earlier form of the study, which do not count."""
    learning_rates: dict[str, float | None]
    """{slug of an arm: its chosen learning rate}; without arms that have not chosen."""

    @property
    def total(self) -> int:
        """Runs of the whole study."""
        return len(self.records) + len(self.missing) + self.unknown


def selection_runs(study: Study, arm: Arm) -> list[Run]:
    """The runs that choose an arm's learning rate: none if there is no choice."""
    rates = study.learning_rates
    return [_run(study, arm, "select", rate, SELECTION_SEED) for rate in rates] if len(rates) > 1 else []


def final_runs(study: Study, arm: Arm, learning_rate: float | None) -> list[Run]:
    """An arm's runs that count; seeds are the same for all arms, so that differences are paired."""
    return [_run(study, arm, "final", learning_rate, seed) for seed in range(study.seeds)]


def choose_learning_rate(study: Study, records: Iterable[Record]) -> float | None:
    """The learning rate of the selection run that is best by the first measure; a run that failed is the worst.

    Of equal ones it is the smallest.
    """
    paths = next(iter(study.measures.values()))
    scored = [(record.measure(paths), record.learning_rate) for record in records]
    best = max(scored, key=lambda entry: (entry[0] is not None, entry[0] or 0.0, -(entry[1] or 0.0)))
    return best[1]


def progress(study: Study, records: Iterable[Record]) -> Progress:
    """Sort a study's records into those that count and stale ones, and find what is missing."""
    by_name = {_name(record.arm, record.stage, record.learning_rate, record.seed): record for record in records}
    current: list[Record] = []
    missing: list[Run] = []
    chosen: dict[str, float | None] = {}
    unknown = 0

    def take(runs: list[Run]) -> list[Record]:
        found = []
        for run in runs:
            record = by_name.get(_name(run.arm, run.stage, run.learning_rate, run.seed))
            if record is not None and record.digest == run.digest:
                found.append(record)
            else:
                missing.append(run)
        current.extend(found)
        return found

    for arm in study.arms():
        selection = selection_runs(study, arm)
        selected = take(selection)
        if len(selected) < len(selection):
            unknown += study.seeds
            continue
        rates = study.learning_rates
        rate = choose_learning_rate(study, selected) if len(selected) > 0 else rates[0] if len(rates) > 0 else None
        chosen[slug(arm)] = rate
        take(final_runs(study, arm, rate))
    counted = {id(record) for record in current}
    return Progress(current, missing, unknown, [r for r in by_name.values() if id(r) not in counted], chosen)


def _name(arm: Arm, stage: Stage, learning_rate: float | None, seed: int) -> str:
    return record_path(Path(), arm, stage, learning_rate, seed).name


def _run(study: Study, arm: Arm, stage: Stage, learning_rate: float | None, seed: int) -> Run:
    fields = study.fields_of(arm) | {"seed": seed}
    if learning_rate is not None:
        fields["optim.lr"] = learning_rate
    test = study.test_of(arm) if stage == "final" else {}
    base = study.base_of(arm)
    content = {
        "fields": {name: value for name, value in (base_fields(base) | fields).items() if name not in _NOT_IN_DIGEST},
        "evaluate": study.evaluate,
        "kept": study.kept,
        "curves": study.curves,
        "test": {name: value for name, value in test.items() if name not in _NOT_IN_DIGEST},
    }
    digest = hashlib.blake2b(canonical(content).encode(), digest_size=16).hexdigest()
    return Run(arm, stage, seed, learning_rate, base, fields, test, digest)


def base_fields(path: Path) -> dict[str, Any]:
    """{dotted field: value} of an experiment file as it is written: variables are not expanded."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return _read_fields(path, None)  # raises
    return _read_fields(path, (state.st_ino, state.st_size, state.st_mtime_ns))


@cache
def _read_fields(path: Path, state: tuple[int, ...] | None) -> dict[str, Any]:
    """Once for each state of the file: every run of a study asks for it."""
    return _flat(read_mapping(str(path), "experiment file"))


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner}
    return flat
