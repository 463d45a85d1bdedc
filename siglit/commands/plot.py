"""`siglit plot RUN RUN ...`: the curves of several runs in one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from siglit.errors import UserError
from siglit.reporting.curves import draw_curves, read_metrics_csv, run_lettering, save_png


@dataclass(frozen=True)
class PlotResult:
    """Where the picture is."""

    path: str
    note: str = ""
    """Why a run is not called by its name, or nothing."""

    def __str__(self) -> str:
        """The path, and the note."""
        return f"{self.path}\n{self.note}" if self.note else self.path


def plot(runs: Sequence[str], out: str) -> PlotResult:
    """Draw the curves of the runs' folders into the PNG `out`.

    Raises:
        UserError: matplotlib is missing, or a folder has no curves.
    """
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise UserError(f"--out is {out}, but a picture in PNG is drawn; name it like curves.png")
    curves = {}
    for name, folder in zip(_names(runs), runs, strict=True):
        curves[name] = read_metrics_csv(Path(folder))
        if not curves[name]:
            raise UserError(f"{Path(folder) / 'metrics.csv'} has no rows yet; wait for the run's first logged step")
    drawn = draw_curves(curves)
    save_png(drawn, path)
    return PlotResult(str(path), run_lettering(curves).note)


def _names(runs: Sequence[str]) -> list[str]:
    """The folders' own names, or as much of the paths as was given where those are not all different."""
    short = [Path(run).resolve().name for run in runs]
    return short if len(set(short)) == len(runs) else list(runs)
