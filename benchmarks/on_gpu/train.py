"""The paper's cheapest recipe on one device: a text tower L12 at 32,768 pairs on rows of 768, compiled, bfloat16.

The step and its parts are those of `benchmarks.train`, a whole `siglit train` on a generated cache. Host syncs are the
operations that torch warns of, which make the host wait for the device; `torch.cuda.synchronize` is not among them.
"""

import argparse
import csv
import functools
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import siglit
from benchmarks.common import begin_peak, peak
from benchmarks.on_gpu.record import Record
from benchmarks.train import tower
from benchmarks.train_turns import recipe, train_until, write_cache
from siglit.cache import EmbeddingCache
from siglit.commands.plan import Plan
from siglit.config import Experiment, ImageTowerConfig
from siglit.training.lightning_internals import is_logged_step
from siglit.training.module import SigLiT

GIB = 2**30
_LOGGED = ("train/mfu", "train/examples_per_second", "time/data", "time/towers", "time/loss", "time/optimizer")
_SYNC = "synchronizing CUDA operation"
_SETTLED = 2
"""Steps that compile and allocate."""


@dataclass(frozen=True)
class Sizes:
    """What is trained, and for how long."""

    text: str = "L12"
    image_tower: str = "vit_base_patch8_224"
    """Only its width counts, which is that of the rows."""
    dim: int = 768
    batch: int = 32_768
    micro_batches: tuple[int, ...] = (4096, 2048, 1024)
    """The first that fits, beside the copies of tower and optimizer that are timed alone."""
    rows: int = 131_072
    steps: int = 5
    """Of a turn."""
    turns: int = 4
    watched: int = 25
    """Steps whose host syncs are counted."""


TINY = Sizes("micro", "test_vit", dim=64, batch=32, micro_batches=(16,), rows=128, steps=1, turns=1, watched=13)


@dataclass(frozen=True)
class Step:
    """One step of a run, from the end of the one before."""

    logged: bool
    syncs: list[str]
    """Where the host waited for the device."""


def step(record: Record, tiny: bool) -> None:
    """Time of a step, its parts, its share of the peak, and the hours of the paper's run."""
    sizes = TINY if tiny else Sizes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for micro in sizes.micro_batches:
            args = _arguments(sizes, record.device, micro)
            cache = _cache(folder, args, sizes)
            figures: dict = {"micro_batch": micro, "batch": sizes.batch, "rows": sizes.rows, "text": sizes.text}
            title = f"micro-batches of {micro}"
            rows = record.attempt(title, lambda a=args, c=cache, f=figures: tower(folder, a, sizes.text, c, f))
            if rows is not None:
                record.figures(**figures)
                record.row("pairs; at once", f"{sizes.batch:,}; {micro:,}")
                for row in rows:
                    record.row(*row)
                return


def host_syncs(record: Record, tiny: bool) -> None:
    """Waits for the device in a step; with the micro-batch that `siglit plan` advises, and the memory it predicts."""
    sizes = TINY if tiny else Sizes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args = _arguments(sizes, record.device, 0, steps=sizes.watched)
        cache = _cache(folder, args, sizes)
        planned = _plan(recipe(folder, args, size=sizes.text, cache=cache, optimizer="lion"), sizes)
        # On a CPU, whose memory it does not ask for, it advises nothing.
        advised = planned.micro_batch_size
        first = advised or sizes.micro_batches[0]
        for micro in (first, *(size for size in sizes.micro_batches if size < first)):
            args.micro_batch = micro
            experiment = recipe(folder, args, size=sizes.text, cache=cache, optimizer="lion")
            before, _ = begin_peak(record.device)
            run = functools.partial(watch, experiment, sizes.watched, record.device)
            steps = record.attempt(f"micro-batches of {micro:,}", run)
            if steps is not None:
                held = peak(record.device) - before
                break
        else:
            return
        record.figures(micro_batch=micro, advised=advised, peak_bytes=held, planned_peak_bytes=planned.peak_bytes)
        record.row("micro-batch", f"{micro:,}", f"{advised:,} by siglit plan" if advised else "")
        if record.device == "cuda":
            record.row("peak memory", f"{held / GIB:.2f} GiB", f"{planned.peak_bytes / GIB:.2f} GiB by siglit plan")
        _syncs(record, unlogged(steps), [step for step in steps if step.logged])
        logged = _last_logged(experiment.folder / "metrics.csv")
        record.figures(logged=logged)
        for column, value in logged.items():
            record.row(f"as siglit train logs it: {column}", f"{value:,.4g}")


def watch(experiment: Experiment, steps: int, device: str) -> list[Step]:
    """Run so many steps of a training, and find where the host waits for the device in each."""
    taken: list[Step] = []
    seen = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def after_step(module: SigLiT) -> bool:
            nonlocal seen
            new, seen = caught[seen:], len(caught)
            syncs = [f"{_short(each.filename)}:{each.lineno}" for each in new if _SYNC in str(each.message)]
            taken.append(Step(is_logged_step(module.trainer), syncs))
            return len(taken) == steps

        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            train_until(experiment, after_step)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return taken


def unlogged(steps: list[Step]) -> list[Step]:
    """The settled steps that are not logged and do not follow one that is: its row is written after its end."""
    return [
        this
        for before, this in zip(steps[_SETTLED - 1 :], steps[_SETTLED:], strict=False)
        if not this.logged and not before.logged
    ]


def _syncs(record: Record, unlogged: list[Step], logged: list[Step]) -> None:
    record.figures(unlogged_steps=len(unlogged))
    if record.device == "cpu":
        record.row("host syncs", f"{len(unlogged)} unlogged steps; torch counts syncs on CUDA alone")
        return
    most = max(len(step.syncs) for step in unlogged)
    record.row(f"host syncs of an unlogged step, at most in {len(unlogged)}", str(most), "0")
    record.row("host syncs of a logged step, at most", str(max(len(step.syncs) for step in logged)))
    places = {
        name: dict(Counter(place for step in steps for place in step.syncs).most_common())
        for name, steps in (("unlogged", unlogged), ("logged", logged))
    }
    record.figures(host_syncs=most, places=places)
    for place, count in list(places["unlogged"].items())[:10]:
        record.row(f"host syncs at {place}", f"{count} in {len(unlogged)} unlogged steps", "0")


def _plan(experiment: Experiment, sizes: Sizes) -> Plan:
    """Plan the run for this device; the rate is not used, only given so that it is not measured."""
    image_tower = ImageTowerConfig(model=sizes.image_tower, pretrained=False)
    return siglit.plan(replace(experiment, image_tower=image_tower), devices=1, examples_per_second=1.0)


def _cache(folder: Path, args: argparse.Namespace, sizes: Sizes) -> EmbeddingCache:
    return write_cache(folder, args, dim=sizes.dim, count=sizes.rows)


def _arguments(sizes: Sizes, device: str, micro: int, steps: int | None = None) -> argparse.Namespace:
    """Options as `benchmarks.train` has them."""
    return argparse.Namespace(
        batch=sizes.batch,
        micro_batch=micro,
        length=16,
        dim=sizes.dim,
        device=device,
        steps=steps or sizes.steps,
        repeats=sizes.turns,
    )


def _last_logged(path: Path) -> dict[str, float]:
    """The values of interest in the last row of metrics.csv that has any."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{name: float(row[name]) for name in _LOGGED if row.get(name)} for row in csv.DictReader(file)]
    return next((row for row in reversed(rows) if row), {})


def _short(path: str) -> str:
    """Path of a module from its package on."""
    parts = Path(path).parts
    start = parts.index("site-packages") + 1 if "site-packages" in parts else max(0, len(parts) - 3)
    return "/".join(parts[start:])
