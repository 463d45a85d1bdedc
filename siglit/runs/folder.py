"""What the stages share of a run: its folder, its caches and its tokenizer.

Knows where a run keeps things; computes nothing.
"""

import json
from pathlib import Path
from typing import Any

from siglit.config import Experiment
from siglit.errors import UserError
from siglit.runtime.files import write_json


def output_dir(experiment: Experiment) -> Path:
    """Return the run's folder, made if it is missing."""
    folder = experiment.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but results need a folder; choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def result_path(experiment: Experiment, kind: str, suffix: str = ".json") -> Path:
    """File of an evaluation's result: zeroshot.json, zeroshot-imagenet.json (eval.name), zeroshot-train.json."""
    split = None if experiment.eval.split == "val" else experiment.eval.split
    return output_dir(experiment) / ("-".join(part for part in (kind, experiment.eval.name, split) if part) + suffix)


def read_run_summary(experiment: Experiment) -> dict[str, Any]:
    """Return the run's summary.json, empty if there is none."""
    path = output_dir(experiment) / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def add_to_summary(experiment: Experiment, command: str, value: Any) -> None:
    """Put one command's figures into the run's summary.json, beside those of the others."""
    write_json(output_dir(experiment) / "summary.json", {**read_run_summary(experiment), command: value})
