"""Records of a study's finished runs: one small JSON file each, which travels with the repository.

Knows what a run measured and which experiment it was of; a record holds no path and nothing of the machine but its
hardware, so that a study grows over several sittings and machines.
"""

import contextlib
import csv
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from siglit.errors import UserError
from siglit.runs.folder import read_json_object
from siglit.runtime.files import write_json
from siglit.studies.definition import Arm, slug

Stage = Literal["select", "final"]
"""select: chooses an arm's learning rate on data.val; final: counts for the verdict."""
SELECTION_SEED = 1000
_AROUND = 10
"""Steps on either side that a spike is compared with."""


@dataclass(frozen=True)
class Record:
    """One finished run."""

    study: str
    arm: Arm
    stage: Stage
    seed: int
    learning_rate: float | None
    """optim.lr of the grid; None: the experiment's own."""
    digest: str
    """Of the experiment and its evaluations, by which a changed study recognizes its old runs."""
    results: dict[str, float]
    """{path: finite number}, such as "retrieval/image_to_text/R@10", "train/logit_bias", "zeroshot/top1"."""
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    """Columns of metrics.csv with their "step", and evaluations of kept checkpoints with their "kept/step"."""
    failed: str | None = None
    """Why the run has no results: training was no longer finite."""
    seconds: float = 0.0
    """Of training and evaluation."""
    examples_per_second: float = 0.0
    hardware: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None

    def measure(self, paths: Iterable[str]) -> float | None:
        """The mean of the results at these paths; None if one is missing.

        A path "curve/COLUMN/spikes" is the number of values of that column of `curves` that are more than twice the
        median of the 21 around them (of fewer at the ends), which follows the learning rate.
        """
        values = [self._value(path) for path in paths]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if 0 < len(known) == len(values) else None

    def _value(self, path: str) -> float | None:
        if not path.startswith("curve/"):
            return self.results.get(path)
        column, _, reduction = path.removeprefix("curve/").rpartition("/")
        values = [value for value in self.curves.get(column, []) if value is not None]
        if reduction != "spikes" or len(values) == 0:
            return None
        around = (values[max(0, at - _AROUND) : at + _AROUND + 1] for at in range(len(values)))
        return float(sum(value > 2 * statistics.median(near) for value, near in zip(values, around, strict=True)))


def record_path(folder: Path, arm: Arm, stage: Stage, learning_rate: float | None, seed: int) -> Path:
    """File of a record in the folder of a study's records."""
    rate = "" if learning_rate is None else f".lr{learning_rate:g}"
    return folder / f"{slug(arm)}.{stage}{rate}.s{seed}.json"


def records_folder(out: Path, study: str) -> Path:
    """Folder of a study's records below the folder of all reports, docs/studies."""
    return out / "data" / study


def write_record(folder: Path, record: Record) -> None:
    """Write a record, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = record_path(folder, record.arm, record.stage, record.learning_rate, record.seed)
    write_json(path, asdict(record))


def read_records(folder: Path, study: str) -> list[Record]:
    """Read all records of a study, in the order of their files' names.

    Raises:
        UserError: a file is damaged, or is no record.
    """
    return [read_record(path, study) for path in sorted(folder.glob("*.json"))]


def read_record(path: Path, study: str) -> Record:
    """Read one record.

    Raises:
        UserError: the file is damaged, is no record of the study, or has the name of another record.
    """
    advice = "restore it, or remove it and run the study again"
    values = read_json_object(path, advice)
    known = {entry.name for entry in fields(Record)}
    record: Record | None = None
    with contextlib.suppress(TypeError):  # a part is missing
        record = Record(**{name: value for name, value in values.items() if name in known})
    if record is None or not _is_whole(record) or record.study != study:
        raise UserError(f"{path} is no record of the study {study}; {advice}")
    name = record_path(path.parent, record.arm, record.stage, record.learning_rate, record.seed).name
    if path.name != name:
        raise UserError(f"{path} holds the record {name}; rename it, or remove it")
    return record


def _is_whole(record: Record) -> bool:
    """Whether all values of a file have the types of a record's."""
    texts = (record.study, record.digest, record.hardware, record.failed or "", record.commit or "")
    numbers = (record.seconds, record.examples_per_second, record.learning_rate or 0.0)
    mappings = (record.arm, record.results, record.curves, record.versions)
    return (
        all(isinstance(text, str) for text in texts)
        and record.stage in ("select", "final")
        and isinstance(record.seed, int)
        and all(map(_is_finite, numbers))
        and all(isinstance(mapping, dict) for mapping in mappings)
        and all(isinstance(text, str) for text in (*record.arm.values(), *record.versions.values()))
        and all(map(_is_finite, record.results.values()))
        and all(isinstance(column, list) for column in record.curves.values())
        and all(value is None or _is_finite(value) for column in record.curves.values() for value in column)
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def flatten(kind: str, value: Mapping[str, Any]) -> dict[str, float]:
    """Finite numbers of a result's JSON by path: {"retrieval/image_to_text/R@1": 0.2, "fewshot/shots/10/mean": 0.5}.

    Lists, texts and the provenance are left out, and what there is one of for each class.
    """
    flat: dict[str, float] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            if name not in ("provenance", "per_class"):
                flat |= flatten(f"{kind}/{name}", inner)
        elif isinstance(inner, (int, float)) and not isinstance(inner, bool) and math.isfinite(inner):
            flat[f"{kind}/{name}"] = float(f"{inner:.7g}")
    return flat


def columns(path: Path, names: tuple[str, ...]) -> dict[str, list[float | None]]:
    """Columns of metrics.csv in five digits, and the step of each row that has one of them; no file: empty."""
    if len(names) == 0 or not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if any(row.get(name) for name in names)]
    values = {name: [_finite(row.get(name)) for row in rows] for name in names}
    return {"step": [float(row["step"]) for row in rows], **values}


def _finite(text: str | None) -> float | None:
    """A value of metrics.csv in five digits; None where there is none, or where it is not finite."""
    value = float(text or "nan")
    return float(f"{value:.5g}") if math.isfinite(value) else None


def last_values(path: Path) -> dict[str, float]:
    """The last value of each column of metrics.csv that has one; no file: empty."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        last = {name: value for row in csv.DictReader(file) for name, value in row.items() if value}
    return {name: float(value) for name, value in last.items() if name not in ("step", "epoch")}


def canonical(value: Any) -> str:
    """JSON in which equal values have equal texts; dates, which YAML knows and JSON does not, are texts."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
