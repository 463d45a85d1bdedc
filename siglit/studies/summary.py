"""README.md of docs/studies: a row per study, from the JSON files that their reports leave, and what verdicts mean.

Knows nothing of records: a study that was reported on another machine counts like any other.
"""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from siglit.errors import UserError
from siglit.runtime.files import write_bytes
from siglit.runtime.text import json_problem
from siglit.studies import markdown, statistics
from siglit.studies.markdown import text

MEANINGS = {
    statistics.REPRODUCED: "Every expectation holds: its 95 % interval lies above the margin.",
    statistics.TREND_ONLY: "At least half of the expectations hold or lean the expected way, but not all hold.",
    statistics.NOT_AT_THIS_SIZE: "Most expectations show no effect here, or the opposite one.",
    statistics.CONTRADICTED: "An expectation came out the other way beyond chance, and none holds.",
    statistics.INCOMPLETE: "Runs are missing or out of date, so nothing is decided yet.",
}
"""{verdict of a study: a sentence}."""
_OF_EXPECTATIONS = {
    statistics.REPRODUCED: "the 95 % interval of the paired difference lies above the margin (0 unless said)",
    statistics.LEANS: "the mean is above the margin, but the interval includes it; more than one seed is needed",
    statistics.NO_EFFECT: "the mean is not above the margin, and the interval includes it",
    statistics.CONTRADICTED: "the interval lies below the margin",
    statistics.INCOMPLETE: "no seed has all of its runs",
}


def write_summary(out: Path) -> Path:
    """Write README.md of the folder `out` from its data/*.json; returns its path.

    Raises:
        UserError: one of the files is malformed.
    """
    studies = {path.stem: _read(path) for path in sorted((out / "data").glob("*.json"))}
    rows = [
        [
            f"[{text(study['title'])}]({quote(name)}.md)",
            text(study["claim"]),
            text(study["source"]),
            f"**{text(study['verdict'])}**",
            _first(study),
            text(study["runs"]) if study["runs"] == study["total"] else f"{study['runs']} of {study['total']}",
        ]
        for name, study in studies.items()
    ]
    header = ["study", "claim", "source", "verdict", "first expectation", "runs"]
    parts = [
        "# Studies",
        "Each page is written by `siglit study report` from the small files in `data/`, one for each run; the verdicts "
        "are computed, from differences between arms that are paired by seed.",
        markdown.table(header, rows, left=5),
        "## What the verdicts mean",
        "\n".join(f"- **{word}**: {meaning}" for word, meaning in MEANINGS.items()),
        "Of a single expectation, a difference between arms with its 95 % t-interval over seeds:",
        "\n".join(f"- **{word}**: {meaning}" for word, meaning in _OF_EXPECTATIONS.items()),
    ]
    path = out / "README.md"
    write_bytes(path, ("\n\n".join(parts) + "\n").encode(errors="replace"))
    return path


def _first(study: dict[str, Any]) -> str:
    """The first expectation with its paired difference and interval."""
    return "; ".join(f"{text(found['say'])}: {text(found['in_words'])}" for found in study["expectations"][:1]) or "–"


def _read(path: Path) -> dict[str, Any]:
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        lacking = {"title", "claim", "source", "verdict", "expectations", "runs", "total"} - study.keys()
        if len(lacking) > 0 or not all({"say", "in_words"} <= found.keys() for found in study["expectations"]):
            raise UserError(f"{path} is not the summary of a study; remove it, and run `siglit study report` again")
    except (ValueError, RecursionError) as error:
        problem = json_problem(error)
        raise UserError(
            f"{path} is not valid JSON: {problem}; remove it, and run `siglit study report` again"
        ) from error
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"{path} is not the summary of a study; remove it, and run `siglit study report` again"
        ) from error
    return dict(study)
