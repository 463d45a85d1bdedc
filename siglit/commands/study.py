"""`siglit study run | report | plan`: a grid of runs that decides one claim.

Knows the flags; `siglit.studies` does the work.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from siglit.commands.plan import plan
from siglit.config import Experiment, count
from siglit.errors import UserError
from siglit.parsing.arguments import load_experiment
from siglit.runtime.progress import format_duration
from siglit.runtime.text import plural
from siglit.studies.definition import Study
from siglit.studies.grid import Run, final_runs, progress, selection_runs
from siglit.studies.records import read_records, records_folder
from siglit.studies.report import StudyReport, report_study
from siglit.studies.running import StudyRunResult, load_run, run_study
from siglit.studies.smoke import smoke_study
from siglit.studies.study_file import read_study


def study_run(
    config: str,
    part: str = "1/1",
    out: str = "docs/studies",
    work: str = "runs/studies",
    full: bool = False,
    smoke: bool = False,
) -> StudyRunResult:
    """Run what is missing of a study, or of one part of it.

    Args:
        config: the study file.
        part: such as "2/4", the second of four parts, which other processes or machines may run at the same time.
        out: folder of reports; a record of each finished run goes into its `data/NAME`.
        work: folder for the runs.
        full: the longer form, for GPUs.
        smoke: all arms once, for two steps on drawn images; its records go into the folder for the runs.

    Raises:
        UserError: the study file, an experiment of it or its data is wrong.
    """
    parts = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", part)
    if parts is None or not 1 <= int(parts[1]) <= int(parts[2]):
        raise UserError(f"--part is {part!r:.40}, but it must be a part's number and their count, such as 2/4")
    study, folder = read_study(config, full=full), Path(work)
    if smoke:
        # Parts at the same time have folders of their own, since each draws its data anew.
        folder = folder / f"{study.name}-smoke{'' if part == '1/1' else f'-{int(parts[1])}'}"
        shutil.rmtree(folder, ignore_errors=True)
        study = smoke_study(study, folder / "data")
        out = str(folder)
    return run_study(study, Path(out), folder, (int(parts[1]), int(parts[2])))


def study_report(config: str, out: str = "docs/studies", full: bool = False) -> StudyReport:
    """Decide a study's claim from its records; write its page, its plot and the summary of all studies.

    Args:
        config: the study file.
        out: folder of the pages; the records are in its `data/NAME`.
        full: the longer form, for GPUs.

    Raises:
        UserError: the study file or a record is wrong, or matplotlib is missing.
    """
    return report_study(config, out, full=full)


@dataclass(frozen=True)
class StudyPlan:
    """What is missing of a study and how long it takes."""

    study: str
    arms: list[tuple[str, int, int, float | None]]
    """Name, missing runs, examples of each, and examples per second of one device (None: not known)."""
    complete: int
    total: int
    devices: int
    recipe: str | None
    """The plan of the recipe of the paper's own scale."""

    @property
    def hours(self) -> float | None:
        """Of all missing runs, one after the other on a device; None where a speed is not known."""
        known = [runs * examples / speed for _, runs, examples, speed in self.arms if speed]
        return sum(known) / 3600 if len(known) == len(self.arms) else None

    def __str__(self) -> str:
        """A row per arm, the sum, and the paper's scale."""
        width = max(len(name) for name, *_ in self.arms)
        lines = [f"{self.study}: {self.complete:,} of {plural(self.total, 'run')} are complete; missing:"]
        lines.append(f"{'arm':<{width}}{'runs':>8}{'examples each':>16}{'examples/s':>12}")
        for name, runs, examples, speed in self.arms:
            lines.append(f"{name:<{width}}{runs:>8,}{examples:>16,}{f'{speed:,.0f}' if speed else '?':>12}")
        if self.hours is None:
            lines.append("time: not known; give --examples-per-second of one device")
        else:
            time = format_duration(self.hours * 3600)
            several = f", {format_duration(self.hours * 3600 / self.devices)} on {plural(self.devices, 'device')}"
            lines.append(
                f"time: {time} on one device{several if self.devices > 1 else ''} (with --part i/n), training alone"
            )
        return "\n".join(lines + ([self.recipe] if self.recipe else []))


def study_plan(
    config: str,
    devices: int = 1,
    examples_per_second: float | None = None,
    out: str = "docs/studies",
    full: bool = False,
) -> StudyPlan:
    """Count the missing runs of a study and estimate their time.

    Args:
        config: the study file.
        devices: devices that share the runs, one run on each at a time.
        examples_per_second: speed of one device; default: that of the records, else measured here in a few steps.
        out: folder of reports, with the records.
        full: the longer form, for GPUs.

    Raises:
        UserError: the study file, an experiment of it or its data is wrong, or an argument is not positive.
    """
    for name, value in {"--devices": devices, "--examples-per-second": examples_per_second}.items():
        if value is not None and value <= 0:
            raise UserError(f"{name} is {value}, but it must be more than 0")
    study = read_study(config, full=full)
    records = read_records(records_folder(Path(out), study.name), study.name)
    state = progress(study, records)
    rows = []
    for arm in study.arms():
        missing = sum(run.arm == arm for run in state.missing)
        grid = selection_runs(study, arm)
        first = grid[0] if len(grid) > 0 else final_runs(study, arm, None)[0]
        if not any(run.arm == arm and run.stage == "final" for run in state.missing) and any(
            run.arm == arm for run in state.missing
        ):
            missing += study.seeds
        speeds = [r.examples_per_second for r in records if r.arm == arm and r.examples_per_second > 0]
        rows.append((", ".join(arm.values()), missing, *_length(first, examples_per_second, speeds)))
    recipe = None if study.paper.recipe is None else _plan_recipe(study, examples_per_second)
    return StudyPlan(study.name, rows, len(state.records), state.total, devices, recipe)


def _length(run: Run, given: float | None, speeds: list[float]) -> tuple[int, float | None]:
    """Examples of a run, and examples per second."""
    experiment = load_run(run, Path("runs/studies/plan"))
    speed = given or (sum(speeds) / len(speeds) if len(speeds) > 0 else None)
    if speed is not None and experiment.train.epochs is None:
        return _examples(experiment), speed
    planned = plan(experiment, examples_per_second=speed)
    return planned.examples or 0, planned.examples_per_second


def _examples(experiment: Experiment) -> int:
    train = experiment.train
    return (train.steps or 0) * train.batch_size if train.steps else count(train.examples or 0)


def _plan_recipe(study: Study, speed: float | None) -> str:
    """One line on the recipe of the paper's scale, on its own devices."""
    assert study.paper.recipe is not None
    experiment = load_experiment(study.paper.recipe)
    examples, devices = _examples(experiment), experiment.train.devices * experiment.train.nodes
    line = f"the paper's scale, {study.paper.recipe}: {examples:,} examples on {plural(devices, 'device')}"
    if speed is None:
        return f"{line}; time: give --examples-per-second of one device"
    hours = examples / speed / devices / 3600
    return f"{line}: {hours:,.0f} hours at {speed:,.0f} examples/s and device"
