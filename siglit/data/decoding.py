"""From units of a source to batches of pixels: decoding and resizing in worker processes, in the source's order.

Knows sources and pictures, not towers or caches. Shapes: N usable images of a batch, H × W the tower's input.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from siglit.data.images import BadImage, decode_image
from siglit.data.sources import Sample, Source, Unit
from siglit.errors import UserError


@dataclass
class PixelBatch:
    """A stretch of one unit: pixels of the usable images, their samples without bytes, and who was left out."""

    unit: int
    """Number of the unit that the batch belongs to."""
    last: bool
    """True for the unit's last batch."""
    pixels: torch.Tensor
    """(N, 3, H, W) uint8."""
    samples: list[Sample] = field(default_factory=list)
    """N samples, their image emptied."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Key and reason of each image left out."""

    def pin_memory(self) -> Self:
        """Pin the pixels; a loader asks for it by this name, and leaves a class without it in pageable memory."""
        self.pixels = self.pixels.pin_memory()
        return self


class UnitPixels(IterableDataset[PixelBatch | UserError]):
    """Batches of the given units; worker w of V makes every V-th, so that a loader hands them out in order."""

    def __init__(
        self,
        source: Source,
        units: Sequence[Unit],
        transform: Callable[[Image.Image], torch.Tensor],
        batch_size: int,
        max_pixels: int,
        draft: int | None = None,
    ):
        """Decode with `transform`, an RGB picture to (3, H, W) uint8; `max_pixels` and `draft` as `decode_image`."""
        self._source, self._units, self._transform = source, units, transform
        self._batch_size, self._max_pixels, self._draft = batch_size, max_pixels, draft

    def __iter__(self) -> Iterator[PixelBatch | UserError]:
        """Yield this worker's batches; a unit without samples gives one empty batch, so that its shard is written too.

        A UserError of the source is handed out instead of raised: a loader would wrap it in the worker's traceback.
        """
        worker = get_worker_info()
        me, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        number = 0
        for unit in self._units:
            try:
                samples = self._source.load(unit)
            except UserError as error:
                yield error
                return
            starts = range(0, max(1, len(samples)), self._batch_size)
            for start in starts:
                if number % workers == me:
                    yield self._batch(unit.number, start == starts[-1], samples[start : start + self._batch_size])
                number += 1

    def _batch(self, unit: int, last: bool, samples: Sequence[Sample]) -> PixelBatch:
        batch, pixels = PixelBatch(unit, last, torch.empty(0)), []
        for sample in samples:
            if not sample.captions and sample.label is None:
                batch.skipped.append((sample.key, "no caption"))
                continue
            try:
                picture = decode_image(sample.image_bytes(), self._max_pixels, self._draft)
                pixels.append(self._transform(picture))
            except BadImage as error:
                batch.skipped.append((sample.key, str(error)))
            except OSError as error:
                batch.skipped.append((sample.key, f"cannot be read: {error.strerror or error}"))
            else:
                batch.samples.append(replace(sample, image=b""))
        batch.pixels = torch.stack(pixels) if pixels else torch.empty(0, dtype=torch.uint8)
        return batch


def pixel_batches(dataset: UnitPixels, workers: int, pin_memory: bool) -> Iterator[PixelBatch]:
    """Run a dataset in `workers` processes (0: in this one) and yield its batches in order.

    Raises:
        UserError: the source found something wrong while reading.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_prepare_worker,
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def _say_nothing(*_: object) -> None:
    pass


def _prepare_worker(_: int) -> None:
    # Ctrl-C reaches the workers too; it is the affair of the process that they work for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker's errors travel to that process with its batches. What would be printed here is the complaint of
    # multiprocessing's own thread that the other end of its pipe has gone, as it has after Ctrl-C.
    sys.excepthook = _say_nothing
    # Each worker owns one core; more threads would fight over it.
    torch.set_num_threads(1)
