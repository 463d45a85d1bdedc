"""What a measurement finds, on the disk at once, and the files that a folder of results is merged into.

Knows nothing of what is measured. A file of results is {"stamp": hardware and versions, "command": …,
"measurements": {name: {"finished", "seconds", "rows", "figures", "problems"}}, "left_out": [{"name", "reason"}]}.
"""

import gc
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import common
from siglit.runtime.files import write_json

PARTS = ("tests", "loss", "train", "precompute", "retrieval")
MERGED, TABLE = "on_gpu.json", "on_gpu.md"
_Result = TypeVar("_Result")
_logger = logging.getLogger(__name__)


class Record:
    """The results of some measurements; each row is in the file before the next thing is measured."""

    def __init__(self, path: Path, device: str):
        """Write to `path`; `device` is where to measure, "cuda" or "cpu"."""
        self._path, self.device = path, device
        self._measurements: dict[str, dict[str, Any]] = {}
        self._stamp = common.stamp()
        self._save()

    def measure(self, name: str, run: Callable[[], None]) -> None:
        """Run one measurement; an error becomes one of its problems, so that others can follow."""
        entry: dict[str, Any] = {"finished": False, "seconds": None, "rows": [], "figures": {}, "problems": []}
        self._measurements[name] = entry
        self._save()
        begun = time.perf_counter()
        self.attempt("the measurement", run)
        entry |= {"finished": True, "seconds": round(time.perf_counter() - begun, 1)}
        self._save()

    def row(self, name: str, figure: str, expected: str = "") -> None:
        """Add a row of the table to the current measurement."""
        self._current["rows"].append({"name": name, "figure": figure, "expected": expected})
        self._save()

    def figures(self, **figures: Any) -> None:
        """Add unrounded numbers to the current measurement."""
        self._current["figures"] |= figures
        self._save()

    def problem(self, text: str) -> None:
        """Add something that must not be."""
        self._current["problems"].append(text)
        self._save()

    def attempt(self, name: str, run: Callable[[], _Result]) -> _Result | None:
        """Return the result of `run`. Where memory does not suffice, a row says so; other errors are problems."""
        try:
            return run()
        except torch.OutOfMemoryError:
            self.row(name, "out of memory")
        except Exception as error:  # whatever a device that was never tried may raise
            _logger.exception("%s failed", name)
            self.problem(f"{name} failed: {first_line(error)}")
        # Only after the handlers, when the exception is gone, nothing holds the tensors of the frames it came through.
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return None

    @property
    def _current(self) -> dict[str, Any]:
        return next(reversed(self._measurements.values()))

    def _save(self) -> None:
        write_json(self._path, {"stamp": self._stamp, "measurements": self._measurements})


def first_line(error: BaseException) -> str:
    """Type and first line of an error, short enough for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def merge(folder: Path) -> str:
    """Write the results of all parts in a folder as one JSON and one table; return the table."""
    paths = {part: folder / f"{part}.json" for part in PARTS}
    parts = {part: json.loads(path.read_text(encoding="utf-8")) for part, path in paths.items() if path.exists()}
    write_json(folder / MERGED, {"parts": parts})
    table = "\n\n".join(_table(part, result) for part, result in parts.items())
    (folder / TABLE).write_text(table + "\n", encoding="utf-8")
    return table


def _table(part: str, result: Mapping[str, Any]) -> str:
    """One part as Markdown."""
    lines = [f"**{part}**: {_stamp_line(result)}", "", "| | measured | expected |", "|---|---|---|"]
    for name, entry in result["measurements"].items():
        rows = [(row["name"], row["figure"], row["expected"]) for row in entry["rows"]]
        rows += [("PROBLEM", problem, "") for problem in entry["problems"]]
        for what, figure, expected in rows:
            cells = (cell.replace("|", "/") for cell in (f"{name}: {what}", figure, expected))
            lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {left['name']} | left out: {left['reason']} | |" for left in result["left_out"]]
    return "\n".join(lines)


def _stamp_line(result: Mapping[str, Any]) -> str:
    stamp, command = result["stamp"], f"`{result['command']}`"
    if not stamp:
        return command
    versions = {"Python": stamp["python"], "CUDA": stamp["cuda"], "cuDNN": stamp["cudnn"], **stamp["versions"]}
    hardware = f"{stamp['gpu'] or 'no GPU'}, {stamp['cores']} cores of {stamp['cpu']}"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{hardware}; {packages}; commit {stamp['commit'] or 'unknown'}; {stamp['time']}; {command}"
