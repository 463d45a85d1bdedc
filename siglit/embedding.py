"""Embeds the images of a source into a cache: the tower's forward pass over decoded batches, shard by shard.

A shard is the unit of work: the ones that are not yet committed are divided among W ranks, and ranks share only the
file system. Knows neither commands nor summaries. Shapes: N images of a batch, D embedding width.
"""

import time
from collections.abc import Iterator
from contextlib import closing
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
from siglit.config import CacheConfig
from siglit.data.decode_workers import PixelBatch, UnitPixels, pixel_batches
from siglit.data.sources.samples import Sample, Source, Unit
from siglit.models.image_tower import ImageTower
from siglit.runtime import machine
from siglit.runtime.files import file_hash
from siglit.runtime.matmul import matmul_precision
from siglit.runtime.paths import expand
from siglit.runtime.progress import Meter
from siglit.runtime.provenance import versions

_TOO_LARGE = "the tower's output is larger than 65504, which float16 cannot hold"
_NOT_FINITE = "the tower's output is not finite"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EmbedResult:
    """A filled cache, and what this run computed of it."""

    cache: EmbeddingCache
    images: int
    """Rows encoded by this run, over all devices; the others were committed before."""
    seconds: float
    tower_images_per_second: float | None
    """Of the tower's forward pass alone on one device, on a batch of this run."""


def embed_source(
    fabric: Fabric,
    tower: ImageTower,
    source: Source,
    path: Path,
    title: str,
    config: CacheConfig,
    *,
    max_image_pixels: int,
    workers: int | None = None,
    precision: str = "auto",
    weights_file: str | None = None,
) -> EmbedResult:
    """Fill the cache in a folder; shards that an earlier run committed are kept.

    Args:
        fabric: launched; the ranks that share the work.
        tower: on the fabric's device.
        source: what to embed.
        path: folder of the cache.
        title: title of the progress.
        config: sizes of shards and batches, and whether to try skipped images again.
        max_image_pixels: largest width × height of an image.
        workers: decoding processes of each rank; None: one per core, at most 16.
        precision: of the forward pass: fp32, bf16, fp16; auto is bf16 on CUDA and fp32 elsewhere.
        weights_file: file that the tower's weights were loaded from, which is part of the fingerprint; None if there
            is none, or if the weights have changed since.

    Raises:
        UserError: the source is invalid where it is read.
        CacheError: the folder holds shards with another fingerprint, or two shards share a key.
    """
    units = source.units(config.shard_size)
    if precision == "auto":
        precision = "bf16" if fabric.device.type == "cuda" else "fp32"
    if workers is None:
        workers = machine.default_workers(config.devices)
    fingerprint = {
        "image_tower": _tower_fingerprint(tower, precision, weights_file),
        "source": source.identity(),
        "shard_size": config.shard_size,
        "max_image_pixels": max_image_pixels,
    }
    own = _own_units(fabric, units, path, fingerprint, config.retry_skipped)
    encoder = _Encoder(fabric, tower, precision)
    # On a CPU more images are no faster, but hold more memory: benchmarks/RESULTS.md.
    batch_size = config.batch_size or (32 if fabric.device.type == "cpu" else 128)
    pixels = UnitPixels(source, own, tower.transform(), batch_size, max_image_pixels, tower.draft())
    begin = time.monotonic()
    images = sum(u.stop - u.start for u in own) or None  # unknown where units are tars
    title += f" (1 of {fabric.world_size} devices)" if fabric.world_size > 1 else ""
    with Meter(title, images, "images", quiet=len(own) == 0 or not fabric.is_global_zero) as meter:
        if len(own) > 0:
            with closing(pixel_batches(pixels, workers, pin_memory=fabric.device.type == "cuda")) as batches:
                _write_shards(batches, encoder, path, fingerprint, meter)
    seconds = time.monotonic() - begin
    encoded = int(torch.as_tensor(fabric.all_reduce(torch.tensor(float(encoder.images)), reduce_op="sum")))
    fabric.barrier()
    if fabric.is_global_zero:
        finish(path, len(units), fingerprint)
    fabric.barrier()
    cache = EmbeddingCache(path)
    fabric.barrier()
    return EmbedResult(cache, encoded, seconds, encoder.tower_rate())


def _tower_fingerprint(tower: ImageTower, precision: str, weights_file: str | None) -> dict[str, Any]:
    file = expand(weights_file, "image_tower.weights") if weights_file else None
    return {
        **tower.fingerprint(),
        "weights_file": None if file is None else file_hash(file),
        "precision": precision,
    }


def _own_units(
    fabric: Fabric, units: list[Unit], path: Path, fingerprint: dict[str, Any], retry_skipped: bool
) -> list[Unit]:
    """The units that this rank embeds: its part of those whose shards are not committed yet."""
    if fabric.is_global_zero:
        remove_unfinished(path)
        if retry_skipped:
            committed_shards(path, fingerprint)  # raises before any shard with another fingerprint is deleted
            remove_shards(path, shards_with_skipped(path))
    fabric.barrier()
    committed = committed_shards(path, fingerprint)
    own = _units_of_rank([u for u in units if u.number not in committed], fabric.global_rank, fabric.world_size)
    # All ranks must have looked before any of them commits, or they would divide different lists.
    fabric.barrier()
    return own


def _units_of_rank(units: list[Unit], rank: int, ranks: int) -> list[Unit]:
    """A rank's units, next to each other: a row group that several units share is read by one rank, mostly."""
    return units[len(units) * rank // ranks : len(units) * (rank + 1) // ranks]


class _Encoder:
    """Pixels to rows on this rank's device; keeps one full batch to time the bare tower on."""

    def __init__(self, fabric: Fabric, tower: ImageTower, precision: str):
        self._fabric, self.tower, self._dtype = fabric, tower, _DTYPES[precision]
        self._timing_batch: torch.Tensor | None = None
        self.images = 0  # rows so far

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        """Embed (N, 3, H, W) uint8 as (N, D) float32."""
        rows = self._forward(pixels.to(self._fabric.device, non_blocking=True)).float().cpu().numpy()
        if self._timing_batch is None or len(pixels) > len(self._timing_batch):
            self._timing_batch = pixels
        return rows

    def tower_rate(self) -> float | None:
        """Images/s of the forward pass alone: the median of three passes over the largest batch."""
        if self._timing_batch is None:
            return None
        seconds = []
        pixels = self._timing_batch.to(self._fabric.device)
        for _ in range(3):
            begin = time.perf_counter()
            self._forward(pixels).float().cpu()
            seconds.append(time.perf_counter() - begin)
        return round(len(pixels) / float(np.median(seconds)), 1)

    def _forward(self, pixels: torch.Tensor) -> torch.Tensor:
        enabled = self._dtype != torch.float32
        autocast = torch.autocast(pixels.device.type, self._dtype, enabled=enabled)
        with torch.inference_mode(), autocast, matmul_precision("highest"):
            return self.tower(pixels)


def _write_shards(
    batches: Iterator[PixelBatch], encoder: _Encoder, path: Path, fingerprint: dict[str, Any], meter: Meter
) -> None:
    """Encode batches and commit one shard for each unit."""
    known_keys = KnownKeys(path)
    for number, unit_batches in _by_unit(batches):
        rows: list[np.ndarray] = []
        samples: list[Sample] = []
        skipped: list[tuple[str, str]] = []
        for batch in unit_batches:
            meter.advance(len(batch.samples) + len(batch.skipped))
            skipped += batch.skipped
            if len(batch.samples) == 0:
                continue
            embedded = encoder(batch.pixels)
            kept = _fits_float16(embedded)
            encoder.images += int(kept.sum())
            rows.append(embedded[kept])
            samples += compress(batch.samples, kept)
            for row in np.flatnonzero(~kept):
                skipped.append((batch.samples[row].key, _skip_reason(embedded[row])))
        known_keys.add(number, [s.key for s in samples])
        _write(path, number, rows, samples, skipped, fingerprint)


def _fits_float16(rows: np.ndarray) -> np.ndarray:
    """(N,) bool: which of the (N, D) rows are finite as float16."""
    with np.errstate(over="ignore"):
        return np.asarray(np.isfinite(rows.astype(np.float16)).all(axis=1))


def _skip_reason(row: np.ndarray) -> str:
    return _TOO_LARGE if np.isfinite(row).all() else _NOT_FINITE


def _write(path: Path, number: int, rows: list, samples: list, skipped: list, fingerprint: dict[str, Any]) -> None:
    width = fingerprint["image_tower"]["width"]
    embeddings = np.concatenate(rows) if len(rows) > 0 else np.empty((0, width), np.float32)
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
