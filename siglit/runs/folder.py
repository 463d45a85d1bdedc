"""A run's folder: where results go, and the summary of what its commands measured.

Knows the names of files; computes nothing.
"""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

from siglit.config import EvalConfig
from siglit.errors import UserError
from siglit.runtime.files import write_json
from siglit.runtime.text import json_problem

_logger = logging.getLogger(__name__)


def ensure_folder(folder: Path) -> Path:
    """Return the run's folder, created if it is missing.

    Raises:
        UserError: there is a file of that name.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but results need a folder; choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def result_path(folder: Path, config: EvalConfig, kind: str, suffix: str = ".json") -> Path:
    """File of an evaluation's result: zeroshot.json, zeroshot-imagenet.json (eval.name), zeroshot-train.json.

    Args:
        folder: of the run, created if it is missing.
        config: of the evaluation: eval.name and eval.split are parts of the name.
        kind: of evaluation, such as "zeroshot".
        suffix: of the file.
    """
    split = None if config.split == "val" else config.split
    name = "-".join(part for part in (kind, config.name, split) if part)
    return ensure_folder(folder) / f"{name}{suffix}"


def read_run_summary(folder: Path) -> dict[str, Any]:
    """Return the run's summary.json, empty if there is none, or with a warning if it is damaged.

    A command that has computed for hours must not fail on its last line.
    """
    path = folder / "summary.json"
    if not path.exists():
        return {}
    summary: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        summary = json.loads(path.read_bytes())
    if isinstance(summary, dict) and all(isinstance(figures, dict) for figures in summary.values()):
        return summary
    _logger.warning(f"{path} is damaged, not a JSON object of objects; the figures in it are left out")
    return {}


def read_json_object(path: Path, advice: str) -> dict[str, Any]:
    """Read a file that siglit wrote into a run's folder.

    Raises:
        UserError: it does not hold a JSON object; the text ends with the advice.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, not JSON ({json_problem(error)}); {advice}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds JSON other than an object {{…}}; {advice}")
    return value


def add_to_summary(folder: Path, command: str, value: Any) -> None:
    """Add one command's figures to the run's summary.json, beside those of the other commands."""
    write_json(ensure_folder(folder) / "summary.json", {**read_run_summary(folder), command: value})
