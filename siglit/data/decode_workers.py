"""Decodes samples to pixels in worker processes: for precompute the units of a source, for training jobs of samples.

Knows sources and images, not towers or caches; `worker_pool.py` runs the processes. Shapes: N images of a batch, S × S
pixels, the tower's input.
"""

import errno
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import Image

from siglit.data.decode_image import BadImage, decode_image
from siglit.data.prefetch import Prefetched
from siglit.data.sources.samples import Sample, Source, Unit
from siglit.data.worker_pool import WorkerPool

MISSING_FILE = f"cannot be read: {os.strerror(errno.ENOENT)}"
"""Reason for an image whose file does not exist."""
_RATIOS = (3 / 4, 4 / 3)
_TRIES = 100


@dataclass
class PixelBatch:
    """Consecutive samples of one unit: pixels of the usable images, their samples without bytes, and the skipped."""

    unit: int
    """Number of the unit that the batch belongs to."""
    last: bool
    """True for the unit's last batch."""
    pixels: torch.Tensor
    """(N, 3, S, S) uint8."""
    samples: list[Sample] = field(default_factory=list)
    """N samples, their image emptied."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Key and reason of each skipped image."""

    def pin_memory(self) -> Self:
        """Pin the pixels; a DataLoader calls it by this name, and leaves a class without it in pageable memory."""
        self.pixels = self.pixels.pin_memory()
        return self


class UnitPixels:
    """Batches of the given units, to be decoded by the workers of `pixel_batches`.

    One process reads the source, however many decode: every row group of a table and every tar's headers are read
    once, and one row group is in memory. Workers receive an image's place in a file, or its bytes if it has none.
    """

    def __init__(
        self,
        source: Source,
        units: Sequence[Unit],
        transform: Callable[[Image.Image], torch.Tensor],
        batch_size: int,
        max_pixels: int,
        draft: int | None = None,
    ):
        """Decode with `transform`, an RGB image to (3, S, S) uint8; `max_pixels` and `draft` as `decode_image`."""
        self._source, self._units, self._batch_size = source, units, batch_size
        self.decode = _BatchDecoder(transform, max_pixels, draft)

    def jobs(self) -> "Iterator[_BatchJob]":
        """Yield the samples of each batch; a unit without samples gives an empty one, so its shard is written too.

        Raises:
            UserError: the source is invalid where it is read.
        """
        for unit in self._units:
            samples = self._source.load(unit)
            starts = range(0, max(1, len(samples)), self._batch_size)
            for start in starts:
                # The image of a sample that is skipped anyway is not read.
                part = [
                    sample.detached() if sample.has_annotation else replace(sample, image=b"")
                    for sample in samples[start : start + self._batch_size]
                ]
                yield _BatchJob(unit.number, start == starts[-1], part)
                del part


class _BatchJob(NamedTuple):
    unit: int
    last: bool
    samples: list[Sample]


class _BatchDecoder:
    def __init__(self, transform: Callable[[Image.Image], torch.Tensor], max_pixels: int, draft: int | None):
        self._transform, self._max_pixels, self._draft = transform, max_pixels, draft

    def __call__(self, job: _BatchJob) -> PixelBatch:
        batch, pixels = PixelBatch(job.unit, job.last, torch.empty(0)), []
        for sample in job.samples:
            if not sample.has_annotation:
                batch.skipped.append((sample.key, "no caption"))
                continue
            try:
                pixels.append(self._transform(_decode(sample, self._max_pixels, self._draft)))
            except BadImage as error:
                batch.skipped.append((sample.key, str(error)))
            else:
                batch.samples.append(replace(sample, image=b""))
        batch.pixels = torch.stack(pixels) if len(pixels) > 0 else torch.empty(0, dtype=torch.uint8)
        return batch


def pixel_batches(units: UnitPixels, workers: int, pin_memory: bool) -> Generator[PixelBatch]:
    """Decode units in `workers` processes (0: in this one) and yield their batches in order.

    Three batches per worker are under way, each as pixels, as names of image files, or, of a table, as their bytes.

    Raises:
        UserError: the source is invalid where it is read; the batches before that are yielded.
    """
    # A thread reads ahead: the loader takes the next job before it hands a finished batch out.
    with (
        closing(Prefetched(units.jobs(), ahead=max(1, workers))) as jobs,
        closing(WorkerPool(units.decode, workers, pin_memory=pin_memory)) as pool,
    ):
        yield from pool.run(jobs)


@dataclass(frozen=True)
class Decoder:
    """Decodes a sample's image to pixels to train on, cropped and mirrored at random where that is configured."""

    transform: Callable[[Image.Image], torch.Tensor]
    """An RGB image to (3, S, S) uint8; after a random crop it should squash, or it cuts off more."""
    image_size: int
    """S."""
    max_pixels: int
    """As `decode_image`."""
    draft: int | None = None
    """As `decode_image`; a crop is decoded as much larger as it may be enlarged."""
    crop: float | None = None
    """Smallest share of the area that a random crop keeps; None: the whole image."""
    flip: bool = False
    """Mirror every other image."""

    def __call__(self, sample: Sample, seed: Sequence[int]) -> torch.Tensor:
        """Return (3, S, S) uint8 pixels; the same seed crops and mirrors the same way.

        Raises:
            BadImage: the image cannot be used.
        """
        draft = self.draft
        if draft is not None and self.crop is not None:
            draft = int(draft / (self.crop * _RATIOS[0]) ** 0.5)
        image = _decode(sample, self.max_pixels, draft)
        # Not torchvision's RandomResizedCrop: it draws from torch's global generator, which may be the training's.
        rng = np.random.default_rng(seed)
        flip = self.flip and rng.random() < 0.5
        if self.crop is not None:
            image = image.crop(_random_box(image.width, image.height, self.crop, rng))
        pixels = self.transform(image)
        return pixels.flip(2) if flip else pixels


class SampleJob(NamedTuple):
    """Samples that a worker decodes together, and a seed for each; images are detached, as workers have no source."""

    samples: list[Sample]
    seeds: list[tuple[int, ...]]


class DecodedSamples(NamedTuple):
    """The pixels of a job."""

    pixels: torch.Tensor
    """(N, 3, S, S) uint8, anything where an image is unusable."""
    unusable: list[tuple[int, str]]
    """Place in the job, and reason."""


def sample_pool(decoder: Decoder, workers: int) -> WorkerPool[SampleJob, DecodedSamples]:
    """A pool of `workers` processes that decode jobs of samples; torch's random state is left alone."""
    return WorkerPool(_SampleDecoder(decoder), workers, generator=torch.Generator())


class _SampleDecoder:
    def __init__(self, decoder: Decoder):
        self._decoder = decoder

    def __call__(self, job: SampleJob) -> DecodedSamples:
        size = self._decoder.image_size
        pixels = torch.empty((len(job.samples), 3, size, size), dtype=torch.uint8)
        unusable = []
        for place, (sample, seed) in enumerate(zip(job.samples, job.seeds, strict=True)):
            try:
                pixels[place] = self._decoder(sample, seed)
            except BadImage as error:
                unusable.append((place, str(error)))
        return DecodedSamples(pixels, unusable)


def _random_box(width: int, height: int, min_area: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge of a crop of `min_area` … 1 of the area, proportions between 3:4 and 4:3.

    The whole image where a hundred draws do not fit in it.

    Source: torchvision `RandomResizedCrop.get_params`; when nothing fits, big_vision `inception_crop`.
    """
    area = width * height * rng.uniform(min_area, 1, _TRIES)
    ratio = np.exp(rng.uniform(math.log(_RATIOS[0]), math.log(_RATIOS[1]), _TRIES))
    widths, heights = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
    fits = np.flatnonzero((widths > 0) & (widths <= width) & (heights > 0) & (heights <= height))
    if len(fits) == 0:
        return 0, 0, width, height
    w, h = int(widths[fits[0]]), int(heights[fits[0]])
    left, upper = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return left, upper, left + w, upper + h


def _decode(sample: Sample, max_pixels: int, draft: int | None) -> Image.Image:
    """Read and decode a sample's image; BadImage also where its file cannot be read."""
    try:
        data = sample.image_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from error
    return decode_image(data, max_pixels, draft)
