"""`siglit report`: everything known of a run on one page, runs/<name>/report.html, which needs nothing but itself.

Collects what the other commands left in the run's folder, and asks the trained towers for pictures; what is not there
is left out, and the page says which command makes it. What a figure looks like is `report_drawing`, `report_tables` and
the files of siglit/assets.
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
    """Where the page is."""

    path: str
    verdict: str
    missing: list[str]
    """Commands whose results it has not."""

    def __str__(self) -> str:
        """The path, the best figures, and what could be added."""
        lines = [self.path, self.verdict]
        if self.missing:
            lines.append(f"not on the page yet: what siglit {', '.join(self.missing)} would tell")
        return "\n".join(lines)


def report(experiment: Experiment) -> ReportResult:
    """Write the page.

    Raises:
        UserError: the output folder holds no run, or a result, the summary or metrics.csv is not what it must be.
    """
    folder = experiment.folder
    results = read_results(folder)
    if not (results or checkpoints.exist(folder / "checkpoints") or (folder / "metrics.csv").is_file()):
        raise UserError(f"there is no run in {folder}; run `siglit train` with this experiment, or set --output_dir")
    try:
        trained, why_not = open_trained(experiment), ""
    except UserError as error:
        trained, why_not = None, str(error)
    context = collect(experiment, folder, results, trained)
    context["notes"] += [f"Towers and images are left out: {why_not}"] if why_not else []
    path = folder / "report.html"
    page = render(context)
    with atomic_write(path) as file:
        file.write(page.encode())
    return ReportResult(str(path), context["verdict"], [row["command"] for row in context["missing"]])
