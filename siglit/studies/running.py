"""Trains and evaluates the runs of a study that have no record yet.

A run is an ordinary run of `siglit train` in a folder of its own. What the runs share is made once: caches and
tokenizers. Other processes may take other parts of the same study at the same time, on this machine or another.
"""

import contextlib
import errno
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from siglit.commands import COMMANDS
from siglit.commands.train import train
from siglit.config import Experiment
from siglit.errors import UserError
from siglit.parsing.arguments import load_experiment
from siglit.runs.folder import read_run_summary
from siglit.runs.launch import quiet_lightning
from siglit.runs.resume import RECORD, experiment_yaml
from siglit.runtime.files import write_bytes
from siglit.runtime.machine import cores
from siglit.runtime.progress import format_duration
from siglit.runtime.provenance import commit, processor, versions
from siglit.runtime.text import plural
from siglit.studies.definition import Arm, Study, slug
from siglit.studies.grid import Run, base_fields, choose_learning_rate, final_runs, progress, selection_runs
from siglit.studies.records import (
    Record,
    columns,
    flatten,
    last_values,
    read_record,
    read_records,
    record_path,
    records_folder,
    write_record,
)
from siglit.studies.shared_files import SharedFiles, waiting_for
from siglit.training.monitor import NonFiniteError

_logger = logging.getLogger(__name__)
_PACKAGES = ("torch", "lightning", "timm", "transformers", "faiss-cpu")
_KEPT_FILES = (".json", ".csv", ".yaml")


@dataclass(frozen=True)
class StudyRunResult:
    """What is done of a study, or of a part of it."""

    study: str
    trained: int
    """Runs of this call."""
    complete: int
    """Runs of the whole study that have a record."""
    total: int
    """Runs of the whole study."""
    seconds: float
    """Of this call."""

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.study}: {plural(self.trained, 'run')} in {format_duration(self.seconds)}; "
            f"{self.complete:,} of {plural(self.total, 'run')} of the study are complete"
        )


def run_study(study: Study, out: Path, work: Path, part: tuple[int, int] = (1, 1)) -> StudyRunResult:
    """Run what is missing of a study, or of one of several parts; a run that was stopped is resumed.

    Args:
        study: the study.
        out: folder of reports, docs/studies; the records go into its `data/<name of the study>`.
        work: folder for the runs and what they share.
        part: number of this part, from 1, and of all parts; a part has whole arms, so parts need not wait for each
            other.

    Raises:
        UserError: an experiment of the study, or its data, is wrong.
        RuntimeError: a run failed for another reason than a loss that is not finite, which is a result.
        KeyboardInterrupt: a signal came; the run is saved.
    """
    quiet_lightning()
    start = time.monotonic()
    number, parts = part
    arms = study.arms()[number - 1 :: parts]
    folder = records_folder(out, study.name)
    _check_writable(folder)
    runner = _Runner(study, out, work / study.name)
    runner.expect(arms)
    for arm in arms:
        selected = [runner.ensure(run) for run in selection_runs(study, arm)]
        rates = study.learning_rates
        rate = choose_learning_rate(study, selected) if len(selected) > 0 else rates[0] if len(rates) > 0 else None
        for run in final_runs(study, arm, rate):
            runner.ensure(run)
    done = progress(study, read_records(folder, study.name))
    return StudyRunResult(study.name, runner.trained, len(done.records), done.total, time.monotonic() - start)


def _check_writable(folder: Path) -> None:
    """Refuse a folder for the records before hours of training rather than after.

    Raises:
        UserError: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"records cannot be written into {folder}: {error.strerror}; choose another --out") from None


def load_run(run: Run, folder: Path, *, test: bool = False) -> Experiment:
    """The experiment of a run in its folder; with `test`, that of its evaluation."""
    own = {"output_dir": str(folder), "train.resume": True}
    return load_experiment(run.base, **{**run.fields, **(run.test if test else {}), **own})


class _Runner:
    """Runs one after the other, with what they share."""

    def __init__(self, study: Study, out: Path, work: Path):
        self._study, self._folder, self._work = study, records_folder(out, study.name), work
        self._equal: dict[str, Record] = {}
        """{digest: record} of other arms and studies, some of which have runs of the same experiment."""
        for other in sorted(out.glob("data/*/")):
            with contextlib.suppress(UserError):  # whatever is wrong there, this study can train all of its runs itself
                self._equal |= {record.digest: record for record in read_records(other, other.name)}
        self._bases = {base: base_fields(base) for base in map(study.base_of, study.arms())}
        self._shared = SharedFiles(self._work)
        self._total = 0
        self._done = 0
        self.trained = 0
        self._seconds = 0.0

    def expect(self, arms: list[Arm]) -> None:
        """Count the runs of these arms that are missing, for the time that is left."""
        state = progress(self._study, read_records(self._folder, self._study.name))
        choosing = sum(slug(arm) not in state.learning_rates for arm in arms)
        self._total = sum(run.arm in arms for run in state.missing) + choosing * self._study.seeds

    def ensure(self, run: Run) -> Record:
        """The run's record, after training and evaluation if it has none.

        A run that another process is at is waited for.
        """
        if record := self._recorded(run):
            _remove_large_files(self._work / run.folder)  # of a process that was killed before it did
        else:
            with waiting_for(self._work / "locks" / run.folder, f"{run}, which another process trains"):
                record = self._recorded(run) or self._made(run)
        return record

    def _recorded(self, run: Run) -> Record | None:
        path = record_path(self._folder, run.arm, run.stage, run.learning_rate, run.seed)
        record = read_record(path, self._study.name) if path.exists() else None
        return None if record is None or record.digest != run.digest else record

    def _made(self, run: Run) -> Record:
        self._done += 1
        if (same := self._equal.get(run.digest)) and self._has_measures(same):
            _logger.info(f"{self._study.name}: {run}: the study {same.study} has trained the same")
            record = replace(
                same, study=self._study.name, arm=run.arm, stage=run.stage, learning_rate=run.learning_rate
            )
            write_record(self._folder, record)
            return record
        left = ""
        if self.trained > 0:
            runs = self._total - self._done + 1
            left = f"; {format_duration(self._seconds / self.trained * runs)} left"
        _logger.info(f"{self._study.name}: run {self._done:,} of {self._total:,}: {run}{left}")
        start = time.monotonic()
        record = self._run(run)
        self._seconds += time.monotonic() - start
        self.trained += 1
        write_record(self._folder, record)
        self._equal[run.digest] = record
        _remove_large_files(self._work / run.folder)
        return record

    def _has_measures(self, record: Record) -> bool:
        """Whether a record of another study has what this one measures, such as a language that only this one names."""
        return record.failed is not None or all(
            record.measure(paths) is not None for paths in self._study.measures.values()
        )

    def _run(self, run: Run) -> Record:
        folder = self._work / run.folder
        experiment = load_run(run, folder)
        if len(self._study.kept) > 0 and experiment.train.keep_every == 0:
            raise UserError(
                f"{self._study.path} evaluates kept checkpoints, but train.keep_every is 0 and none is kept; set it, "
                "or leave `kept` out"
            )
        evaluated = load_run(run, folder, test=True) if run.test else experiment
        if base_fields(run.base) != self._bases[run.base]:
            raise UserError(f"{run.base} has changed since the study was started; run the study again")
        # Studies have caches in common, therefore the folder of all of them.
        with waiting_for(self._work.parent, "another process, which prepares what the runs share"):
            self._shared.precompute(experiment, experiment.cache.splits)
            if run.test:
                fewshot = "eval-fewshot" in {*self._study.evaluate, *self._study.kept}
                self._shared.precompute(evaluated, ["train", "val"] if fewshot else ["val"])
            tokenizer = self._shared.tokenizer(experiment)
        if tokenizer is not None:
            experiment, evaluated = (
                replace(e, tokenizer=replace(e.tokenizer, path=tokenizer)) for e in (experiment, evaluated)
            )
        start = time.monotonic()
        results: dict[str, float] = {}
        curves: dict[str, list[float | None]] = {}
        failed, speed = None, 0.0
        try:
            metrics, speed = _train(experiment)
        except NonFiniteError as error:
            failed = re.split(r";|, in the batch", str(error))[0]  # what follows are paths
        else:
            # A run that was stopped and resumed has logged some of them before.
            metrics |= last_values(folder / "metrics.csv")
            results |= {name: float(f"{value:.7g}") for name, value in metrics.items() if math.isfinite(value)}
            for command in self._study.evaluate:
                results |= self._named(_evaluate(command, evaluated))
            if run.stage == "final":
                curves |= self._kept(evaluated)
        curves |= columns(folder / "metrics.csv", self._study.curves)
        return Record(
            study=self._study.name,
            arm=run.arm,
            stage=run.stage,
            seed=run.seed,
            learning_rate=run.learning_rate,
            digest=run.digest,
            results=results,
            curves=curves,
            failed=failed,
            seconds=round(time.monotonic() - start, 2),
            examples_per_second=round(speed, 1),
            hardware=_hardware(experiment),
            versions=versions(_PACKAGES),
            commit=commit(),
        )

    def _named(self, results: Mapping[str, float]) -> dict[str, float]:
        """The results without those of single languages, unless a measure names them."""
        named = {path for paths in self._study.measures.values() for path in paths}
        return {
            path: value
            for path, value in results.items()
            if "/by_language/" not in path or "/by_language/average/" in path or path in named
        }

    def _kept(self, experiment: Experiment) -> dict[str, list[float | None]]:
        """Evaluations of the checkpoints that train.keep_every has kept, by step."""
        if len(self._study.kept) == 0:
            return {}
        rows = []
        for path in sorted((experiment.folder / "checkpoints").glob("step-*.ckpt")):
            at = replace(experiment, eval=replace(experiment.eval, checkpoint=str(path)))
            row: dict[str, float] = {"step": float(int(path.stem.removeprefix("step-")))}
            for command in self._study.kept:
                row |= self._named(_evaluate(command, at))
            rows.append(row)
        return {f"kept/{name}": [row.get(name) for row in rows] for name in (rows[0] if rows else ())}


def _train(experiment: Experiment) -> tuple[dict[str, float], float]:
    """Train, or resume; return the last logged metrics and the examples per second."""
    if experiment.train.devices * experiment.train.nodes == 1:
        result = train(experiment)
        return result.metrics, result.examples_per_second
    # Lightning starts the other ranks with this process's own command line, which is that of the study.
    experiment.folder.mkdir(parents=True, exist_ok=True)
    path = experiment.folder / f"study-{RECORD}"
    write_bytes(path, experiment_yaml(experiment).encode())
    done = subprocess.run([sys.executable, "-m", "siglit", "train", "-c", str(path), "--resume"], check=False)
    if done.returncode in (130, 143):
        raise KeyboardInterrupt(f"stopped in {experiment.folder}; the same command goes on from there")
    if done.returncode == NonFiniteError.exit_code:
        raise NonFiniteError("the loss or the weights are no longer finite")
    if done.returncode != 0:
        raise UserError(f"training in {experiment.folder} ended with exit code {done.returncode}; its error is above")
    summary = read_run_summary(experiment.folder)["train"]
    return summary["metrics"], summary["examples_per_second"]


def _evaluate(command: str, experiment: Experiment) -> dict[str, float]:
    return flatten(command.removeprefix("eval-"), COMMANDS[command].load()(experiment).to_json())


def _remove_large_files(folder: Path) -> None:
    """Leave the run's experiment, metrics and results; its weights, index and embeddings are removed."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix not in _KEPT_FILES:
            path.unlink(missing_ok=True)


def _hardware(experiment: Experiment) -> str:
    if torch.cuda.is_available() and experiment.train.accelerator != "cpu":
        return f"{experiment.train.devices * experiment.train.nodes} × {torch.cuda.get_device_name(0)}"
    threads = plural(torch.get_num_threads(), "thread")
    return f"{processor()}, {plural(cores(), 'core')}, {threads}"
