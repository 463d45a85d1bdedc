"""`siglit precompute`: encodes the images of each split once with the frozen tower, shard by shard.

Sets up devices and checks the result; `siglit.embedding` computes and writes the shards.
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
from siglit.data.decode_workers import MISSING_FILE
from siglit.data.sources import open_source
from siglit.data.sources.samples import Source
from siglit.embedding import embed_source
from siglit.errors import UserError
from siglit.models.image_tower import ImageTower
from siglit.runs.folder import add_to_summary, ensure_folder, read_run_summary
from siglit.runs.launch import check_accelerator, check_launched, check_slurm_tasks, is_first_process, quiet_lightning
from siglit.runtime.malloc import reusing_freed_memory
from siglit.runtime.paths import expand
from siglit.runtime.signals import ending_with_first_process, stopping_at_signals
from siglit.runtime.text import plural


@dataclass(frozen=True)
class SplitResult:
    """The cache of one split after precompute."""

    path: str
    rows: int
    skipped: int
    skipped_by_reason: dict[str, int]
    encoded_now: int
    """Rows encoded by this run; the others already existed."""
    seconds: float
    images_per_second: float | None = None
    """Images that this run encoded per second on all devices together; None if it encoded none."""
    tower_images_per_second: float | None = None
    """Speed of the tower's forward pass alone on one device, measured on a batch of this run."""


@dataclass(frozen=True)
class PrecomputeResult:
    """The caches of all splits."""

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
                f"{name}: {plural(split.rows, 'row')} in {split.path}, {split.encoded_now:,} encoded now{rate}{skipped}"
            )
        return "\n".join(lines)


@reusing_freed_memory()
def precompute(experiment: Experiment) -> PrecomputeResult:
    """Encode the images of cache.splits into their caches; continues where an interrupted run stopped.

    Raises:
        UserError: mode is not locked, a data source or the tower cannot be opened, the machine lacks devices, or more
            than data.max_skipped of the images are unusable.
        CacheError: the folder holds a cache of another source or tower, or another process is writing it.
    """
    quiet_lightning()
    if experiment.mode != "locked":
        raise UserError(
            f"mode is {experiment.mode}, which trains on images, so there is nothing to precompute; run `siglit train`"
        )
    check_accelerator("cache", experiment.cache.accelerator, experiment.cache.devices)
    check_launched("cache.nodes", experiment.cache.nodes)
    check_slurm_tasks("cache", experiment.cache.devices, experiment.cache.nodes)
    ensure_folder(experiment.folder)
    first = is_first_process()
    specs = {split: getattr(experiment.data, split) for split in experiment.cache.splits}
    sources = {split: open_source(spec) for split, spec in specs.items() if spec is not None}
    if len(sources) == 0:
        raise UserError("cache.splits is [val], but data.val is not set; set it, or add train to cache.splits")
    with ExitStack() as stack:
        stack.enter_context(stopping_at_signals())
        stack.enter_context(ending_with_first_process(first))
        # Before the other ranks are started, so that they need not be stopped if the lock is taken.
        for split in sources if first else ():
            stack.enter_context(exclusive(experiment.cache_folder / split))
        fabric = _fabric(experiment.cache)
        tower = ImageTower(experiment.image_tower)
        fabric.launch()
        tower.to(fabric.device)
        result = PrecomputeResult({split: _split(experiment, fabric, tower, split, s) for split, s in sources.items()})
        if fabric.is_global_zero:
            _save_summary(experiment, result)
    return result


def _save_summary(experiment: Experiment, result: PrecomputeResult) -> None:
    # A run that encodes nothing has no speed; the entry of the run that encoded the split stays.
    name = "-".join(part for part in ("precompute", experiment.eval.name) if part)
    earlier = read_run_summary(experiment.folder).get(name, {})
    entries = {
        split: asdict(figures)
        for split, figures in result.splits.items()
        if figures.encoded_now > 0 or earlier.get(split) is None
    }
    add_to_summary(experiment.folder, name, {**earlier, **entries})


def _fabric(config: CacheConfig) -> Fabric:
    several = config.devices * config.nodes > 1
    return Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.nodes,
        # Ranks synchronize only at the end of a split, however long the slowest takes.
        strategy=DDPStrategy(timeout=timedelta(days=30)) if several else "auto",
    )


def _split(experiment: Experiment, fabric: Fabric, tower: ImageTower, split: str, source: Source) -> SplitResult:
    path = experiment.cache_folder / split
    done = embed_source(
        fabric,
        tower,
        source,
        path,
        f"precompute {split}",
        experiment.cache,
        max_image_pixels=experiment.data.max_image_pixels,
        workers=experiment.data.workers,
        precision=experiment.image_tower.precision,
        weights_file=experiment.image_tower.weights,
    )
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
    """Refuse a split without samples, and a cache with too many skipped images, which is left incomplete."""
    total = len(cache) + cache.num_skipped
    if total == 0:
        raise UserError(f"data.{split} has no samples, so {cache.path} is empty; check data.{split}")
    share = cache.num_skipped / total
    if share > experiment.data.max_skipped:
        key, reason = cache.skipped[0]
        # Without its index the cache is incomplete, and nothing trains on it until the user has decided.
        (cache.path / "index.json").unlink(missing_ok=True)
        if cache.num_skipped == total and {reason for _, reason in cache.skipped} == {MISSING_FILE}:
            folder, field = _images_folder(getattr(experiment.data, split))
            raise UserError(
                f"there are no images in {folder}: data.{split} lists {plural(total, 'file')}, the first is {key!r}, "
                f"but none exists; check data.{split}.{field}, then run with --cache.retry_skipped true"
            )
        raise UserError(
            f"{cache.num_skipped} of {total} images ({share:.1%}) are unusable, more than data.max_skipped "
            f"({experiment.data.max_skipped:.1%}); the first is {key!r}: {reason}. Raise data.max_skipped and rerun, "
            "or fix the images and rerun with --cache.retry_skipped true; completed work is kept, and "
            f"`siglit cache skipped {cache.path}` lists the images"
        )


def _images_folder(spec: SourceSpec) -> tuple[str, str]:
    """Absolute path of the folder that relative image paths start from, and the field that sets it."""
    path = expand(spec.images or spec.path, "images" if spec.images else "path")
    folder = path if os.path.isdir(path) or spec.images else os.path.dirname(path)
    return os.path.abspath(folder), "path" if spec.format in ("folder", "class_folders") else "images"
