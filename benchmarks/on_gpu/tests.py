"""The tests marked `cuda`, run by pytest in this process; a test's outcome is recorded when it is known."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.on_gpu.record import Record

_ROOT = Path(__file__).parents[2]
_ONE_FILE = "tests/evaluation/test_retrieval.py"
_WANTED = 40
# Versions that were not tested together may warn of each other, as in the Makefile's test-latest.
_WARN = [word for kind in ("Deprecation", "PendingDeprecation", "Future") for word in ("-W", f"default::{kind}Warning")]


def cuda_tests(record: Record, tiny: bool) -> None:
    """Run them all; tiny: those of one file."""
    outcomes = _Outcomes(record)
    files = str(_ROOT / (_ONE_FILE if tiny else "tests"))
    words = ["-m", "cuda", "-p", "no:cacheprovider", "--continue-on-collection-errors", *_WARN]
    status = pytest.main(["--rootdir", str(_ROOT), *words, files], plugins=[outcomes])
    counts = outcomes.counts
    run = counts["passed"] + counts["failed"]
    record.figures(status=int(status), **counts)
    record.row("passed", f"{counts['passed']} of {run}", "" if tiny else f"all, ≥ {_WANTED}")
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
