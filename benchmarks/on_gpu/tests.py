"""The tests marked `cuda`, run by pytest in this process; a test's outcome is recorded when it is known.

In several processes, because every later test of a process fails once a kernel has gone wrong.
"""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.on_gpu.record import Record

_ROOT = Path(__file__).parents[2]
_FOLDERS = ("tests/loss", "tests/training", "tests/evaluation")
_ONE_FILE = "tests/evaluation/test_linear_probe.py"
# Versions that were not tested together may warn of each other, as in the Makefile's test-latest.
_WARN = [word for kind in ("Deprecation", "PendingDeprecation", "Future") for word in ("-W", f"default::{kind}Warning")]


def loss(record: Record, tiny: bool) -> None:
    """Values, gradients, exchanges, masks and micro-batches."""
    _run(record, tiny, _FOLDERS[0])


def training(record: Record, tiny: bool) -> None:
    """Precisions, compilation, modes and resuming."""
    _run(record, tiny, _FOLDERS[1])


def evaluation(record: Record, tiny: bool) -> None:
    """Retrieval and the linear probe."""
    _run(record, tiny, _FOLDERS[2])


def others(record: Record, tiny: bool) -> None:
    """All other tests."""
    _run(record, tiny, "tests", *(f"--ignore={_ROOT / folder}" for folder in _FOLDERS))


def _run(record: Record, tiny: bool, folder: str, *options: str) -> None:
    """Run the tests of a folder; tiny: always those of the same file."""
    outcomes = _Outcomes(record)
    words = ["--rootdir", str(_ROOT), "-m", "cuda", "-p", "no:cacheprovider", "--continue-on-collection-errors", *_WARN]
    status = pytest.main([*words, *options, str(_ROOT / (_ONE_FILE if tiny else folder))], plugins=[outcomes])
    counts = outcomes.counts
    run = counts["passed"] + counts["failed"]
    record.figures(status=int(status), **counts)
    record.row("passed", f"{counts['passed']} of {run}", "all")
    record.row("skipped", str(counts["skipped"]))
    if record.device == "cuda" and run == 0:
        record.problem(f"no test ran: pytest ended with status {int(status)}, see on_gpu.log")


class _Outcomes:
    """A plugin of pytest that counts outcomes and records failures."""

    def __init__(self, record: Record):
        self._record = record
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: when it was called, or when its setup failed or skipped it; a failed teardown too."""
        if report.failed:
            self.counts["failed"] += 1
            self._record.problem(f"{report.nodeid} ({report.when}): {_message(report)}")
        elif report.when == "call" or report.skipped:
            self.counts[report.outcome] += 1
        self._record.figures(**self.counts)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record a file that cannot be imported here, and with it the tests that were not run."""
        if report.failed:
            self._record.row(f"not collected: {report.nodeid}", _message(report))


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The line of the error itself: pytest marks it with E."""
    lines = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return (lines[0] if lines else report.longreprtext.strip().splitlines()[-1])[:160]
