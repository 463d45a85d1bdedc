"""`siglit precompute`: encodes the images of each split once with the frozen tower, shard by shard.

A shard is the unit of work: rank r of W takes every W-th one that is not yet committed, and ranks share only the file
system. Shapes: N images of a batch, D embedding width.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy

from siglit import run as run_folder
from siglit.cache import (
    EmbeddingCache,
    committed_shards,
    exclusive,
    finish,
    remove_shards,
    remove_unfinished,
    shards_with_skipped,
    write_shard,
)
from siglit.config import CacheConfig, Experiment
from siglit.data.decoding import PixelBatch, UnitPixels, pixel_batches
from siglit.data.sources import Source, Unit, open_source
from siglit.errors import UserError
from siglit.models.image_tower import ImageTower
from siglit.paths import expand
from siglit.progress import Meter
from siglit.stopping import ending_with_first_process, stopping_at_signals

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def run(experiment: Experiment) -> PrecomputeResult:
    """Fill the caches of all splits, going on where an earlier run stopped.

    Raises:
        UserError: source, tower or an existing cache do not fit the experiment, or too many images are unusable.
    """
    run_folder.quiet_lightning()
    run_folder.check_accelerator("cache.accelerator", experiment.cache.accelerator)
    run_folder.output_dir(experiment)
    first = run_folder.is_first_process()
    specs = {"train": experiment.data.train, "val": experiment.data.val}
    sources = {split: open_source(spec) for split, spec in specs.items() if spec is not None}
    with ExitStack() as stack:
        stack.enter_context(stopping_at_signals())
        stack.enter_context(ending_with_first_process(first))
        # Before the other ranks are started: who is refused leaves alone.
        for split in sources if first else ():
            stack.enter_context(exclusive(run_folder.cache_path(experiment, split)))
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
    earlier = run_folder.summary(experiment).get("precompute", {})
    done = {name: earlier.get(name) for name, split in result.splits.items() if not split.encoded_now}
    figures = {name: done.get(name) or asdict(split) for name, split in result.splits.items()}
    run_folder.add_to_summary(experiment, "precompute", figures)


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
    path = run_folder.cache_path(experiment, split)
    units = source.units(experiment.cache.shard_size)
    precision = _precision(experiment, fabric)
    fingerprint = _fingerprint(experiment, tower, source, precision)
    if fabric.is_global_zero:
        remove_unfinished(path)
        if experiment.cache.retry_skipped:
            committed_shards(path, fingerprint)  # raises before anything of other settings is deleted
            remove_shards(path, shards_with_skipped(path))
    fabric.barrier()
    there = committed_shards(path, fingerprint)
    mine = [u for u in units if u.number not in there][fabric.global_rank :: fabric.world_size]
    # All ranks must have looked before any of them commits, or they would deal out different lists.
    fabric.barrier()
    encoder = _Encoder(experiment, fabric, tower, precision)
    begun = time.monotonic()
    _encode_units(experiment, fabric, source, mine, encoder, path, fingerprint, split)
    seconds = time.monotonic() - begun
    encoded = int(torch.as_tensor(fabric.all_reduce(torch.tensor(float(encoder.images)), reduce_op="sum")))
    fabric.barrier()
    if fabric.is_global_zero:
        finish(path, len(units), fingerprint)
    fabric.barrier()
    cache = EmbeddingCache(path)
    fabric.barrier()
    _check_skipped(experiment, cache)
    return SplitResult(
        path=str(path),
        rows=len(cache),
        skipped=cache.num_skipped,
        skipped_by_reason=dict(Counter(reason for _, reason in cache.skipped).most_common(10)),
        encoded_now=encoded,
        seconds=round(seconds, 2),
        images_per_second=round(encoded / seconds, 1) if encoded else None,
        tower_images_per_second=encoder.own_rate(),
    )


class _Encoder:
    """Pixels to rows on this rank's device; remembers one full batch to time the bare tower on."""

    def __init__(self, experiment: Experiment, fabric: Fabric, tower: ImageTower, precision: str):
        self._fabric, self._tower, self._dtype = fabric, tower, _DTYPES[precision]
        self._kept: torch.Tensor | None = None
        self.images = 0

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        """Embed (N, 3, H, W) uint8 as (N, D) float32."""
        rows = self._forward(pixels.to(self._fabric.device, non_blocking=True)).float().cpu().numpy()
        self.images += len(pixels)
        if self._kept is None or len(pixels) > len(self._kept):
            self._kept = pixels
        return rows

    def own_rate(self) -> float | None:
        """Images/s of the forward pass alone: the median of three passes over the kept batch."""
        if self._kept is None:
            return None
        seconds = []
        pixels = self._kept.to(self._fabric.device)
        for _ in range(3):
            begun = time.perf_counter()
            self._forward(pixels).float().cpu()
            seconds.append(time.perf_counter() - begun)
        return round(len(pixels) / float(np.median(seconds)), 1)

    def _forward(self, pixels: torch.Tensor) -> torch.Tensor:
        enabled = self._dtype != torch.float32
        with torch.inference_mode(), torch.autocast(pixels.device.type, self._dtype, enabled=enabled):
            return self._tower(pixels)


def _encode_units(
    experiment: Experiment,
    fabric: Fabric,
    source: Source,
    units: list[Unit],
    encoder: _Encoder,
    path: Path,
    fingerprint: dict[str, Any],
    split: str,
) -> None:
    """Encode this rank's units and commit one shard for each."""
    dataset = UnitPixels(
        source,
        units,
        encoder._tower.transform(),
        experiment.cache.batch_size,
        experiment.data.max_image_pixels,
        encoder._tower.draft(),
    )
    batches = pixel_batches(dataset, _workers(experiment), pin_memory=fabric.device.type == "cuda")
    known = sum(u.stop - u.start for u in units)
    title = f"precompute {split}" + (f" (1 of {fabric.world_size} devices)" if fabric.world_size > 1 else "")
    with Meter(title, known or None, "images", quiet=not fabric.is_global_zero) as meter:
        for number, of_unit in _by_unit(batches if units else iter(())):
            rows, samples, skipped = [], [], []
            for batch in of_unit:
                if batch.samples:
                    rows.append(encoder(batch.pixels))
                samples += batch.samples
                skipped += batch.skipped
                meter.advance(len(batch.samples) + len(batch.skipped))
            _write(path, number, rows, samples, skipped, fingerprint)


def _write(path: Path, number: int, rows: list, samples: list, skipped: list, fingerprint: dict[str, Any]) -> None:
    embeddings = np.concatenate(rows) if rows else np.empty((0, fingerprint["image_tower"]["width"]), np.float32)
    write_shard(
        path,
        number,
        embeddings=embeddings,
        keys=[s.key for s in samples],
        captions=[s.captions for s in samples],
        langs=[s.langs or ("",) * len(s.captions) for s in samples],
        labels=[s.label for s in samples],
        skipped=skipped,
        fingerprint=fingerprint,
    )


def _by_unit(batches: Iterator[PixelBatch]) -> Iterator[tuple[int, Iterator[PixelBatch]]]:
    """Group an ordered stream of batches by their unit."""

    def rest(first: PixelBatch) -> Iterator[PixelBatch]:
        batch = first
        yield batch
        while not batch.last:
            batch = next(batches)
            yield batch

    for first in batches:
        yield first.unit, rest(first)


def _fingerprint(experiment: Experiment, tower: ImageTower, source: Source, precision: str) -> dict[str, Any]:
    weights = experiment.image_tower.weights
    path = expand(weights, "image_tower.weights") if weights else None
    return {
        "image_tower": {
            **tower.fingerprint(),
            "weights_file": run_folder.file_hash(path) if path else None,
            "precision": precision,
        },
        "source": source.identity(),
        "shard_size": experiment.cache.shard_size,
        "max_image_pixels": experiment.data.max_image_pixels,
    }


def _precision(experiment: Experiment, fabric: Fabric) -> str:
    asked = experiment.image_tower.precision
    return asked if asked != "auto" else "bf16" if fabric.device.type == "cuda" else "fp32"


def _workers(experiment: Experiment) -> int:
    if experiment.data.workers is not None:
        return experiment.data.workers
    return max(1, min(16, (os.cpu_count() or 1) // experiment.cache.devices))


def _check_skipped(experiment: Experiment, cache: EmbeddingCache) -> None:
    seen = len(cache) + cache.num_skipped
    if seen == 0:
        raise UserError(f"the split of {cache.path} is empty: no sample was found in it")
    share = cache.num_skipped / seen
    if share > experiment.data.max_skipped:
        key, reason = cache.skipped[0]
        # Not complete until the person has decided: nothing trains on it in the meantime.
        (cache.path / "index.json").unlink(missing_ok=True)
        raise UserError(
            f"{cache.num_skipped} of {seen} images ({share:.1%}) could not be used, more than data.max_skipped "
            f"({experiment.data.max_skipped:.1%}); the first is {key!r}: {reason}. The rest is kept in {cache.path}; "
            "raise data.max_skipped and run again, or mend the images and run with --cache.retry_skipped true"
        )
