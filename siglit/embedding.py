"""Images of a source into a cache: the tower's forward pass over decoded batches, shard by shard.

A shard is the unit of work: the ones that are not yet committed are cut into W stretches, one for each of W ranks, and
ranks share only the file system. Knows neither commands nor summaries. Shapes: N images of a batch, D embedding width.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from siglit.cache import (
    EmbeddingCache,
    KnownKeys,
    committed_shards,
    finish,
    remove_shards,
    remove_unfinished,
    shards_with_skipped,
    write_shard,
)
from siglit.config import Experiment
from siglit.data.decoding import PixelBatch, UnitPixels, pixel_batches
from siglit.data.sources import Sample, Source, Unit
from siglit.models.image_tower import ImageTower
from siglit.runtime import machine
from siglit.runtime.files import file_hash
from siglit.runtime.paths import expand
from siglit.runtime.progress import Meter
from siglit.runtime.provenance import versions

_TOO_LARGE = "the tower's output is larger than 65504, which float16 cannot hold"
_NOT_FINITE = "the tower's output is not finite"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Embedded:
    """A filled cache, and what this run did for it."""

    cache: EmbeddingCache
    images: int
    """Rows encoded by this run, over all devices; the others were there."""
    seconds: float
    tower_images_per_second: float | None
    """Of the tower's forward pass alone on one device, on a batch of this run."""


def embed_source(
    experiment: Experiment, fabric: Fabric, tower: ImageTower, source: Source, path: Path, title: str
) -> Embedded:
    """Fill the cache in the folder `path`, going on where an earlier run stopped.

    Args:
        experiment: how to decode, how large batches and shards are.
        fabric: launched; the ranks that share the work.
        tower: on the fabric's device.
        source: what to embed.
        path: folder of the cache.
        title: what the progress is called.

    Raises:
        UserError: the source is found wrong while reading.
        CacheError: the folder holds shards that something else made, or a key stands in two shards.
    """
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
    mine = _stretch([u for u in units if u.number not in there], fabric.global_rank, fabric.world_size)
    # All ranks must have looked before any of them commits, or they would deal out different lists.
    fabric.barrier()
    encoder = _Encoder(fabric, tower, precision)
    begun = time.monotonic()
    _encode_units(experiment, fabric, source, mine, encoder, path, fingerprint, title)
    seconds = time.monotonic() - begun
    encoded = int(torch.as_tensor(fabric.all_reduce(torch.tensor(float(encoder.images)), reduce_op="sum")))
    fabric.barrier()
    if fabric.is_global_zero:
        finish(path, len(units), fingerprint)
    fabric.barrier()
    cache = EmbeddingCache(path)
    fabric.barrier()
    return Embedded(cache, encoded, seconds, encoder.own_rate())


def _stretch(units: list[Unit], rank: int, ranks: int) -> list[Unit]:
    """A rank's units, next to each other: a row group that several units share is read by one rank, mostly."""
    return units[len(units) * rank // ranks : len(units) * (rank + 1) // ranks]


class _Encoder:
    """Pixels to rows on this rank's device; remembers one full batch to time the bare tower on."""

    def __init__(self, fabric: Fabric, tower: ImageTower, precision: str):
        self._fabric, self.tower, self._dtype = fabric, tower, _DTYPES[precision]
        self._kept: torch.Tensor | None = None
        self.images = 0  # that got a row

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        """Embed (N, 3, H, W) uint8 as (N, D) float32."""
        rows = self._forward(pixels.to(self._fabric.device, non_blocking=True)).float().cpu().numpy()
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
            return self.tower(pixels)


def _encode_units(
    experiment: Experiment,
    fabric: Fabric,
    source: Source,
    units: list[Unit],
    encoder: _Encoder,
    path: Path,
    fingerprint: dict[str, Any],
    title: str,
) -> None:
    """Encode this rank's units and commit one shard for each."""
    dataset = UnitPixels(
        source,
        units,
        encoder.tower.transform(),
        experiment.cache.batch_size,
        experiment.data.max_image_pixels,
        encoder.tower.draft(),
    )
    batches = pixel_batches(dataset, _workers(experiment), pin_memory=fabric.device.type == "cuda")
    known = sum(u.stop - u.start for u in units)
    known_keys = KnownKeys(path)
    title += f" (1 of {fabric.world_size} devices)" if fabric.world_size > 1 else ""
    with Meter(title, known or None, "images", quiet=not fabric.is_global_zero) as meter:
        for number, of_unit in _by_unit(batches if units else iter(())):
            rows: list[np.ndarray] = []
            samples: list[Sample] = []
            skipped: list[tuple[str, str]] = []
            for batch in of_unit:
                meter.advance(len(batch.samples) + len(batch.skipped))
                skipped += batch.skipped
                if not batch.samples:
                    continue
                embedded = encoder(batch.pixels)
                kept = _fits_float16(embedded)
                encoder.images += int(kept.sum())
                rows.append(embedded[kept])
                samples += compress(batch.samples, kept)
                for row in np.flatnonzero(~kept):
                    skipped.append((batch.samples[row].key, _reason_against(embedded[row])))
            known_keys.add(number, [s.key for s in samples])
            _write(path, number, rows, samples, skipped, fingerprint)


def _fits_float16(rows: np.ndarray) -> np.ndarray:
    """(N,) bool: which of the (N, D) rows are finite as float16."""
    with np.errstate(over="ignore"):
        return np.asarray(np.isfinite(rows.astype(np.float16)).all(axis=1))


def _reason_against(row: np.ndarray) -> str:
    return _TOO_LARGE if np.isfinite(row).all() else _NOT_FINITE


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
        versions={**versions(("Pillow", "timm")), "torch": torch.__version__},
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
            "weights_file": file_hash(path) if path else None,
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
    return machine.default_workers(experiment.cache.devices)
