"""`siglit plot RUN RUN ...`: the curves of several runs in one figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from siglit.errors import UserError
from siglit.reporting.curves import draw_curves, read_metrics_csv, run_lettering, save_png


@dataclass(frozen=True)
class PlotResult:
    """File of the figure."""

    path: str
    note: str = ""
    """Which letters of the runs' names no font has; usually empty."""

    def __str__(self) -> str:
        """The path, and the note."""
        return f"{self.path}\n{self.note}" if self.note else self.path


def plot(runs: Sequence[str], out: str = "curves.png") -> PlotResult:
    """Draw the curves of the runs' folders into the PNG `out`.

    Raises:
        UserError: matplotlib is missing, a folder has no curves, or `out` is not a .png file.
    """
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise UserError(f"--out is {out}, but it must end in .png, such as curves.png")
    curves = {}
    for name, folder in zip(_names(runs), runs, strict=True):
        curves[name] = read_metrics_csv(Path(folder))
        if len(curves[name]) == 0:
            raise UserError(f"{Path(folder) / 'metrics.csv'} has no rows yet; wait for the run's first logged step")
    save_png(draw_curves(curves), path)
    return PlotResult(str(path), run_lettering(curves).note)


def _names(runs: Sequence[str]) -> list[str]:
    """The folders' names, or their paths if two names are equal."""
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(runs) else list(runs)
