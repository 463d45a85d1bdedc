"""`siglit report`: summarizes a run in one self-contained HTML page, runs/<name>/report.html.

Opens the run's results and its trained towers; `siglit.reporting` turns them into the page. Results that do not exist
are left out, and the page names the commands that compute them.
"""

from dataclasses import dataclass

from siglit.config import Experiment
from siglit.errors import UserError
from siglit.reporting.page import collect, render
from siglit.reporting.results import read_results
from siglit.runs import checkpoints
from siglit.runs.trained import open_trained
from siglit.runtime.files import atomic_write


@dataclass(frozen=True)
class ReportResult:
    """File and contents of the page."""

    path: str
    summary: str
    """The main metrics in one line."""
    missing: list[str]
    """Commands whose results the page does not include."""

    def __str__(self) -> str:
        """The path, the main metrics, and what could be added."""
        lines = [self.path, self.summary]
        if len(self.missing) > 0:
            lines.append(f"Not included yet: run {', '.join(f'`siglit {command}`' for command in self.missing)}")
        return "\n".join(lines)


def report(experiment: Experiment) -> ReportResult:
    """Write report.html into the run's folder.

    Raises:
        UserError: the output folder holds no run, or one of its result files, summary.json or metrics.csv is malformed.
    """
    folder = experiment.folder
    results = read_results(folder)
    has_run = checkpoints.exist(folder / "checkpoints") or (folder / "metrics.csv").is_file()
    if len(results) == 0 and not has_run:
        raise UserError(f"there is no run in {folder}; run `siglit train` with this experiment, or set --output_dir")
    try:
        trained, reason = open_trained(experiment), ""
    except UserError as error:
        trained, reason = None, str(error)
    context = collect(experiment, folder, results, trained)
    if trained is None:
        context["notes"].append(f"Retrieved images are left out: {reason}")
    path = folder / "report.html"
    page = render(context)
    with atomic_write(path) as file:
        file.write(page.encode())
    return ReportResult(str(path), context["summary"], [row["command"] for row in context["missing"]])
