"""From samples to pixels in worker processes: the units of a source in its order, or lists of samples as they come.

Knows sources and pictures, not towers or caches. Shapes: N images of a batch, S × S the tower's input.
"""

import errno
import gc
import math
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from siglit.data.images import BadImage, decode_image
from siglit.data.prefetch import Prefetched
from siglit.data.sources import Sample, Source, Unit
from siglit.errors import UserError

MISSING_FILE = f"cannot be read: {os.strerror(errno.ENOENT)}"
"""Why an image whose file is not there cannot be used."""
_RATIOS = (3 / 4, 4 / 3)
_TRIES = 100
_WORKER_GRACE = 30.0


@dataclass
class PixelBatch:
    """A stretch of one unit: pixels of the usable images, their samples without bytes, and who was left out."""

    unit: int
    """Number of the unit that the batch belongs to."""
    last: bool
    """True for the unit's last batch."""
    pixels: torch.Tensor
    """(N, 3, S, S) uint8."""
    samples: list[Sample] = field(default_factory=list)
    """N samples, their image emptied."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Key and reason of each image left out."""

    def pin_memory(self) -> Self:
        """Pin the pixels; a loader asks for it by this name, and leaves a class without it in pageable memory."""
        self.pixels = self.pixels.pin_memory()
        return self


class UnitPixels:
    """Batches of the given units, to be decoded by the workers of `pixel_batches`.

    One process reads the source, however many decode: every row group of a table and every tar's headers are read
    once, and one row group is in memory. Workers are dealt an image's place in a file, or its bytes if it has none.
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
        """Decode with `transform`, an RGB picture to (3, S, S) uint8; `max_pixels` and `draft` as `decode_image`."""
        self._source, self._units, self._batch_size = source, units, batch_size
        self.decoder = _StretchDecoder(transform, max_pixels, draft)

    def stretches(self) -> "Iterator[_Stretch | UserError]":
        """Yield what a batch each is made of; a unit without samples gives an empty one, so its shard is written too.

        A UserError of the source is handed out instead of raised, and last, so that all batches before it are too.
        """
        try:
            for unit in self._units:
                samples = self._source.load(unit)
                starts = range(0, max(1, len(samples)), self._batch_size)
                for start in starts:
                    part = [_dealt(sample) for sample in samples[start : start + self._batch_size]]
                    yield _Stretch(unit.number, start == starts[-1], part)
                    del part
        except UserError as error:
            yield error


class _Stretch(NamedTuple):
    unit: int
    last: bool
    samples: list[Sample]


def _says_nothing(sample: Sample) -> bool:
    return not sample.captions and sample.label is None


def _dealt(sample: Sample) -> Sample:
    """The sample as a worker gets it; an image that nobody will look at is not read."""
    return replace(sample, image=b"") if _says_nothing(sample) else sample.carried()


class _StretchDecoder(Dataset[PixelBatch | UserError]):
    def __init__(self, transform: Callable[[Image.Image], torch.Tensor], max_pixels: int, draft: int | None):
        self._transform, self._max_pixels, self._draft = transform, max_pixels, draft

    def __getitem__(self, stretch: _Stretch | UserError) -> PixelBatch | UserError:
        # Handed on instead of raised: a loader would wrap it in the worker's traceback.
        if isinstance(stretch, UserError):
            return stretch
        batch, pixels = PixelBatch(stretch.unit, stretch.last, torch.empty(0)), []
        for sample in stretch.samples:
            if _says_nothing(sample):
                batch.skipped.append((sample.key, "no caption"))
                continue
            try:
                pixels.append(self._transform(_picture(sample, self._max_pixels, self._draft)))
            except BadImage as error:
                batch.skipped.append((sample.key, str(error)))
            else:
                batch.samples.append(replace(sample, image=b""))
        batch.pixels = torch.stack(pixels) if pixels else torch.empty(0, dtype=torch.uint8)
        return batch


def pixel_batches(units: UnitPixels, workers: int, pin_memory: bool) -> Iterator[PixelBatch]:
    """Decode units in `workers` processes (0: in this one) and yield their batches in order.

    Three batches per worker are under way, each as pixels, as names of image files, or, of a table, as their bytes.

    Raises:
        UserError: the source found something wrong while reading.
    """
    # A thread reads ahead: the loader asks for the next one before it hands a finished batch out.
    stretches = Prefetched(units.stretches(), ahead=max(1, workers))
    loader: DataLoader = DataLoader(
        units.decoder,
        batch_size=None,
        sampler=_Jobs(stretches),
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=2 if workers else None,
        worker_init_fn=_prepare_worker,
    )
    try:
        for item in _ended_with_program(loader):
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        stretches.close()


@dataclass(frozen=True)
class Decoder:
    """A sample's image as pixels to train on, cropped and mirrored at random where that is asked for."""

    transform: Callable[[Image.Image], torch.Tensor]
    """An RGB picture to (3, S, S) uint8; after a random crop it should squash, or it cuts off more."""
    image_size: int
    """S."""
    max_pixels: int
    """As `decode_image`."""
    draft: int | None = None
    """As `decode_image`; a crop is decoded as much larger as it may be enlarged."""
    crop: float | None = None
    """Smallest share of the area that a random crop keeps; None: the whole picture."""
    flip: bool = False
    """Mirror every other picture."""

    def __call__(self, sample: Sample, seed: Sequence[int]) -> torch.Tensor:
        """Return (3, S, S) uint8 pixels; the same seed crops and mirrors the same way.

        Raises:
            BadImage: the image cannot be used.
        """
        draft = self.draft
        if draft is not None and self.crop is not None:
            draft = int(draft / (self.crop * _RATIOS[0]) ** 0.5)
        picture = _picture(sample, self.max_pixels, draft)
        # torchvision's own draw from torch's global generator, which here may be the training's.
        draw = np.random.default_rng(seed)
        flip = self.flip and draw.random() < 0.5
        if self.crop is not None:
            picture = picture.crop(_random_box(picture.width, picture.height, self.crop, draw))
        pixels = self.transform(picture)
        return pixels.flip(2) if flip else pixels


class Job(NamedTuple):
    """Samples to decode at one go, and a seed for each; images are carried, so that the source stays where it is."""

    samples: list[Sample]
    seeds: list[tuple[int, ...]]


class Decoded(NamedTuple):
    """What became of a job."""

    pixels: torch.Tensor
    """(N, 3, S, S) uint8, anything where an image is unusable."""
    unusable: list[tuple[int, str]]
    """Place in the job, and reason."""


class Decoding:
    """Worker processes that decode jobs; they stay between runs and end with `close`, or with this object."""

    def __init__(self, decoder: Decoder, workers: int):
        """Take the number of processes; 0: decode in this one. They start with the first run."""
        self._jobs = _Jobs(iter(()))
        self._loader: DataLoader = DataLoader(
            _DecodedJobs(decoder),
            batch_size=None,
            sampler=self._jobs,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_prepare_worker,
            # A loader draws a seed for its workers; from torch's own generator it would shift the training's.
            generator=torch.Generator(),
        )

    def run(self, jobs: Iterator[Job | UserError]) -> Iterator[Decoded | UserError]:
        """Start on jobs, of which two per worker are taken ahead, and return what becomes of them, in their order.

        A UserError is handed out instead of raised: a loader would wrap it in the worker's traceback. One that comes in
        place of a job is handed out as it is.
        """
        self._jobs.jobs = jobs
        return _ended_with_program(self._loader)

    def close(self) -> None:
        """End the processes and wait for them."""
        running = getattr(self._loader, "_iterator", None)
        if running is not None:
            # Dropping it does the same, but not while a traceback holds it. Lightning closes loaders this way too.
            running._shutdown_workers()
            self._loader._iterator = None


class _Jobs:
    """What a loader takes for its sampler."""

    def __init__(self, jobs: Iterator):
        self.jobs = jobs

    def __iter__(self) -> Iterator:
        return self.jobs


class _DecodedJobs(Dataset[Decoded | UserError]):
    def __init__(self, decoder: Decoder):
        self._decoder = decoder

    def __getitem__(self, job: Job | UserError) -> Decoded | UserError:
        if isinstance(job, UserError):
            return job
        size = self._decoder.image_size
        pixels = torch.empty((len(job.samples), 3, size, size), dtype=torch.uint8)
        unusable = []
        for place, (sample, seed) in enumerate(zip(job.samples, job.seeds, strict=True)):
            try:
                pixels[place] = self._decoder(sample, seed)
            except BadImage as error:
                unusable.append((place, str(error)))
            except UserError as error:
                return error
        return Decoded(pixels, unusable)


def _random_box(width: int, height: int, least: float, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge of a crop of `least` … 1 of the area, its proportions between 3:4 and 4:3.

    The whole picture where a hundred draws do not fit in it.

    Source: torchvision `RandomResizedCrop.get_params`; when nothing fits, big_vision `inception_crop`.
    """
    area = width * height * draw.uniform(least, 1, _TRIES)
    ratio = np.exp(draw.uniform(math.log(_RATIOS[0]), math.log(_RATIOS[1]), _TRIES))
    wide, high = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
    fits = np.flatnonzero((wide > 0) & (wide <= width) & (high > 0) & (high <= height))
    if not len(fits):
        return 0, 0, width, height
    w, h = int(wide[fits[0]]), int(high[fits[0]])
    left, upper = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
    return left, upper, left + w, upper + h


def _picture(sample: Sample, max_pixels: int, draft: int | None) -> Image.Image:
    """Read and decode a sample's image; BadImage also where its file cannot be read."""
    try:
        data = sample.image_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from error
    return decode_image(data, max_pixels, draft)


def _ended_with_program(loader: DataLoader) -> Iterator:
    """iter(loader); at the program's end its workers are asked to end before multiprocessing sends them SIGTERM."""
    items = iter(loader)
    if loader.num_workers:
        # Finalizers run last made first, so a thread that takes items ends before the workers that make them.
        weakref.finalize(items, _shut_down, weakref.ref(items))
    return items


def _shut_down(items: weakref.ref) -> None:
    running = items()
    if running is not None:
        running._shutdown_workers()


def _say_nothing(*_: object) -> None:
    pass


def _end_later(*_: object) -> None:
    timer = threading.Timer(_WORKER_GRACE, os._exit, (128 + signal.SIGTERM,))
    timer.daemon = True
    timer.start()


def _prepare_worker(_: int) -> None:
    # Ctrl-C reaches the workers too; it is the affair of the process that they work for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # SLURM and `timeout` send SIGTERM to all processes of a run; the first one may still want to end its step.
    signal.signal(signal.SIGTERM, _end_later)
    # A worker's errors travel to that process with its batches. What would be printed here is the complaint of
    # multiprocessing's own thread that the other end of its pipe has gone, as it has after Ctrl-C.
    sys.excepthook = _say_nothing
    # A collection would write to every page that is shared with that process, and so copy it.
    gc.freeze()
    # Each worker owns one core; more threads would fight over it.
    torch.set_num_threads(1)
