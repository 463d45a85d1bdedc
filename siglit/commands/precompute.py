"""`siglit precompute`: encodes the images of each split once with the frozen tower, shard by shard.

How a shard is made is `siglit.embedding`.
"""

import os
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import timedelta

from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy

from siglit.cache import EmbeddingCache, exclusive
from siglit.config import CacheConfig, Experiment, SourceSpec
from siglit.data.decoding import MISSING_FILE
from siglit.data.sources import Source, open_source
from siglit.embedding import embed_source
from siglit.errors import UserError
from siglit.models.image_tower import ImageTower
from siglit.runs.folder import add_to_summary, ensure_folder, read_run_summary
from siglit.runs.launch import check_accelerator, check_launched, check_slurm_tasks, is_first_process, quiet_lightning
from siglit.runtime.paths import expand
from siglit.runtime.signals import ending_with_first_process, stopping_at_signals


@dataclass(frozen=True)
class SplitResult:
    """What became of one split."""

    path: str
    rows: int
    skipped: int
    skipped_by_reason: dict[str, int]
    encoded_now: int
    """Rows encoded by this run; the others were there."""
    seconds: float
    images_per_second: float | None = None
    """Of this run, over all devices."""
    tower_images_per_second: float | None = None
    """Of the tower's forward pass alone on one device, on a batch of this run."""


@dataclass(frozen=True)
class PrecomputeResult:
    """What became of every split."""

    splits: dict[str, SplitResult] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line per split."""
        lines = []
        for name, split in self.splits.items():
            rate = "" if split.images_per_second is None else f", {split.images_per_second:,.0f} images/s"
            if split.tower_images_per_second is not None:
                rate += f" (tower alone {split.tower_images_per_second:,.0f})"
            skipped = "".join(f"; {n} skipped: {reason}" for reason, n in split.skipped_by_reason.items())
            lines.append(
                f"{name}: {split.rows:,} rows in {split.path}, {split.encoded_now:,} encoded now{rate}{skipped}"
            )
        return "\n".join(lines)


def precompute(experiment: Experiment) -> PrecomputeResult:
    """Fill the caches of cache.splits, going on where an earlier run stopped.

    Raises:
        UserError: source, tower or an existing cache do not fit the experiment, or too many images are unusable.
    """
    quiet_lightning()
    if experiment.mode != "locked":
        raise UserError(
            f"mode is {experiment.mode}: training takes the images themselves, and there is nothing to precompute; go "
            "on with `siglit train`"
        )
    check_accelerator("cache.accelerator", experiment.cache.accelerator)
    check_launched("cache.nodes", experiment.cache.nodes)
    check_slurm_tasks("cache", experiment.cache.devices, experiment.cache.nodes)
    ensure_folder(experiment.folder)
    first = is_first_process()
    specs = {split: getattr(experiment.data, split) for split in experiment.cache.splits}
    sources = {split: open_source(spec) for split, spec in specs.items() if spec is not None}
    if not sources:
        raise UserError("cache.splits is [val], but data.val is not set; set it, or let cache.splits have train")
    with ExitStack() as stack:
        stack.enter_context(stopping_at_signals())
        stack.enter_context(ending_with_first_process(first))
        # Before the other ranks are started: who is refused leaves alone.
        for split in sources if first else ():
            stack.enter_context(exclusive(experiment.cache_folder / split))
        fabric = _fabric(experiment.cache)
        tower = ImageTower(experiment.image_tower)
        fabric.launch()
        tower.to(fabric.device)
        result = PrecomputeResult({split: _split(experiment, fabric, tower, split, s) for split, s in sources.items()})
        if fabric.is_global_zero:
            _keep_figures(experiment, result)
    return result


def _keep_figures(experiment: Experiment, result: PrecomputeResult) -> None:
    # A run that found everything done has no rates of its own and keeps those of the one that did it.
    name = "-".join(part for part in ("precompute", experiment.eval.name) if part)
    earlier = read_run_summary(experiment.folder).get(name, {})
    done = {split: earlier.get(split) for split, figures in result.splits.items() if not figures.encoded_now}
    now = {split: done.get(split) or asdict(figures) for split, figures in result.splits.items()}
    add_to_summary(experiment.folder, name, {**earlier, **now})


def _fabric(config: CacheConfig) -> Fabric:
    several = config.devices * config.nodes > 1
    return Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.nodes,
        # Ranks meet only at the end of a split, however long the slowest takes.
        strategy=DDPStrategy(timeout=timedelta(days=30)) if several else "auto",
    )


def _split(experiment: Experiment, fabric: Fabric, tower: ImageTower, split: str, source: Source) -> SplitResult:
    path = experiment.cache_folder / split
    done = embed_source(experiment, fabric, tower, source, path, f"precompute {split}")
    _check_skipped(experiment, split, done.cache)
    return SplitResult(
        path=str(path),
        rows=len(done.cache),
        skipped=done.cache.num_skipped,
        skipped_by_reason=dict(Counter(reason for _, reason in done.cache.skipped).most_common(10)),
        encoded_now=done.images,
        seconds=round(done.seconds, 2),
        images_per_second=round(done.images / done.seconds, 1) if done.images else None,
        tower_images_per_second=done.tower_images_per_second,
    )


def _check_skipped(experiment: Experiment, split: str, cache: EmbeddingCache) -> None:
    seen = len(cache) + cache.num_skipped
    if seen == 0:
        raise UserError(f"the split of {cache.path} is empty: no sample was found in it")
    share = cache.num_skipped / seen
    if share > experiment.data.max_skipped:
        key, reason = cache.skipped[0]
        # Not complete until the person has decided: nothing trains on it in the meantime.
        (cache.path / "index.json").unlink(missing_ok=True)
        if cache.num_skipped == seen and {reason for _, reason in cache.skipped} == {MISSING_FILE}:
            folder, field = _images_folder(getattr(experiment.data, split))
            raise UserError(
                f"no image was found below {folder}: all {seen} files that data.{split} names are missing, the first "
                f"is {key!r}; check data.{split}.{field}, then run with --cache.retry_skipped true"
            )
        raise UserError(
            f"{cache.num_skipped} of {seen} images ({share:.1%}) could not be used, more than data.max_skipped "
            f"({experiment.data.max_skipped:.1%}); the first is {key!r}: {reason}. The rest is kept in {cache.path}; "
            "raise data.max_skipped and run again, or mend the images and run with --cache.retry_skipped true; "
            f"`siglit cache skipped {cache.path}` lists them"
        )


def _images_folder(spec: SourceSpec) -> tuple[str, str]:
    """The folder that relative paths of images start from, absolute, and the field that sets it."""
    path = expand(spec.images or spec.path, "images" if spec.images else "path")
    folder = path if os.path.isdir(path) or spec.images else os.path.dirname(path)
    return os.path.abspath(folder), "path" if spec.format in ("folder", "class_folders") else "images"
