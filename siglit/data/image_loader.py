"""Training batches of images from a source, for towers that learn: decoded in every pass, by worker processes.

Knows sources, captions and pixels, not towers; `sample_rows.py` numbers the samples and `order.py` draws their order.
Shapes: B pairs per rank, G = B · W pairs over W ranks, S × S pixels, L tokens.
"""

import itertools
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Literal

import numpy as np
import torch
from typing_extensions import override

from siglit.data.corruption import Corruption, noise_pixels
from siglit.data.decode_image import BadImage
from siglit.data.decode_workers import DecodedSamples, Decoder, SampleJob, sample_pool
from siglit.data.epoch_loader import Batch, EpochLoader, image_ids, row_hash
from siglit.data.order import WindowOrder
from siglit.data.prefetch import Prefetched
from siglit.data.random_hash import choose_captions
from siglit.data.sample_rows import SampleRow, SampleRows, SampleWindow
from siglit.data.sources.samples import Sample, Source
from siglit.data.worker_pool import WorkerPool
from siglit.errors import UserError
from siglit.models.tokenizer import Tokenizer

UNIT_SAMPLES = 1024
WINDOW_UNITS = 16
MAX_REPLACEMENTS = 1024
"""Samples of a window, at most, that replace its unusable images."""
CHUNK = 32
"""Images that a worker decodes in one job."""

_TRIES = 100
_MIN_SKIPPED = 10
"""Fewer unusable images than this do not end a pass, whatever their share."""


class ImageLoader(EpochLoader):
    """Passes over the captioned samples of a source, their images decoded and augmented in worker processes.

    `shuffle: rows` keeps all samples in memory and permutes them exactly; an image in a file or a tar is kept as its
    place, any other as its bytes. `blocks` takes the units in random order and mixes their samples within windows of
    16 units; a window is read while the one before it is decoded, and two are in memory, each with this rank's samples
    alone. Pixels, pairs and their order depend on seed, pass and row, not on ranks, workers or a resumed run.

    Another pair of its window, drawn from (seed, pass, row), replaces an unusable image, so that a batch is always
    whole. One batch is made ahead, and two chunks per worker.

    Attributes:
        seen: images that this rank decoded since it was made, unusable ones included.
        skipped: the unusable ones among them, by reason.
    """

    _order: WindowOrder
    _ahead = 1

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        decoder: Decoder,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        max_skipped: float,
        labels: bool = False,
        shuffle: Literal["rows", "blocks"] = "rows",
        auto_shuffle: bool = False,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        corruption: Corruption | None = None,
    ):
        """Count the captions of the source, which reads its listing, or the headers and texts of its tars.

        Args:
            source: images and their captions.
            tokenizer: captions to ids.
            decoder: an image to pixels.
            batch_size: global batch G.
            seed: seed of order, caption choice and augmentation.
            workers: processes of this rank that decode; 0: the thread that puts batches together.
            max_skipped: largest share of unusable images, 0–1.
            labels: images of one class are to share an id.
            shuffle: an exact permutation, or one of units; the same on all ranks.
            auto_shuffle: `shuffle` was chosen automatically: a restored position replaces it.
            rank: number of this rank.
            world_size: number of ranks W.
            pin_memory: hand out page-locked tensors, which CUDA copies while it computes.
            corruption: what to corrupt, for the noise study.

        Raises:
            UserError: the source cannot be read, a key occurs twice, G is not divisible by W, or there are fewer
                captioned samples than G. A pass raises it when too many images are unusable.
        """
        self._source, self._tokenizer, self._decoder = source, tokenizer, decoder
        self._workers, self._max_skipped, self._labels, self._pin = workers, max_skipped, labels, pin_memory
        self._idle: WorkerPool[SampleJob, DecodedSamples] | None = None
        self._busy: WorkerPool[SampleJob, DecodedSamples] | None = None
        self.seen = 0
        self.skipped: Counter[str] = Counter()
        self._first_skipped = ""
        super().__init__(
            source.name,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            auto_shuffle=auto_shuffle,
            rank=rank,
            world_size=world_size,
            corruption=corruption,
        )

    @override
    def __iter__(self) -> Iterator[Batch]:
        """Hand out the rest of the current pass, then make the next one current.

        Worker processes stay for the next pass, but not where this one is stopped early.
        """
        epoch = self.epoch
        try:
            yield from super().__iter__()
        finally:
            if self.epoch == epoch:
                self._end_idle()

    @override
    def keys(self, rows: Sequence[int]) -> list[str]:
        """The keys of rows; reads their units again unless all samples are in memory."""
        unique, place = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        samples = self._rows.read(unique)
        return [samples[i].key for i in place]

    @override
    def close(self) -> None:
        """Stop the current pass, and end the worker processes, those at work and those that wait for another pass."""
        super().close()
        self._end_idle()
        if self._busy is not None:
            self._busy.close()
            self._busy = None

    def _end_idle(self) -> None:
        if self._idle is not None:
            self._idle.close()
            self._idle = None

    @override
    def _set_shuffle(self, shuffle: str) -> None:
        self.shuffle = shuffle
        hold = shuffle == "rows"
        self._rows = SampleRows(self._source, unit_samples=UNIT_SAMPLES, hold=hold, quiet=self._share.rank > 0)
        window_units = len(self._rows.counts) if hold else WINDOW_UNITS
        self._order = WindowOrder(self._rows.counts, self._rows.of_unit, self._seed, window_units)
        self.count = self._order.count

    @override
    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        chunks: deque[list[SampleRow]] = deque()
        jobs = self._jobs(epoch, first, chunks)
        self._busy = pool = self._idle or sample_pool(self._decoder, self._workers)
        self._idle = None
        # Here and not in the thread that makes the batches: the processes are forked before there are threads.
        decoded = pool.run(jobs)
        return self._batches_of(epoch, first, pool, jobs, decoded, chunks)

    def _jobs(self, epoch: int, first: int, chunks: deque[list[SampleRow]]) -> Generator[SampleJob]:
        """Cut this rank's rows of the pass into jobs that end with batches; append the rows of each job to `chunks`."""
        with closing(self._sample_rows(epoch, first)) as rows:
            for _ in range(first, len(self)):
                for start in range(0, self._share.size, CHUNK):
                    chunk = list(itertools.islice(rows, min(CHUNK, self._share.size - start)))
                    chunks.append(chunk)
                    yield SampleJob(
                        [row.sample for row in chunk], [self._augment_seed(epoch, row.row) for row in chunk]
                    )
                    del chunk

    def _sample_rows(self, epoch: int, first: int) -> Generator[SampleRow]:
        """This rank's rows of the pass with their samples, from batch `first` on; a thread reads a window ahead."""
        windows = (
            SampleWindow(self._rows, window.own, window.rows[:MAX_REPLACEMENTS])
            for window in self._order.windows(epoch, first, self._share)
        )
        with closing(Prefetched(windows, ahead=1)) as ready:
            for window in ready:
                yield from window
                # The thread may read on as soon as the next one is taken, and then this one would be a third.
                del window

    def _batches_of(
        self,
        epoch: int,
        first: int,
        pool: WorkerPool[SampleJob, DecodedSamples],
        jobs: Generator[SampleJob],
        decoded: Iterator[DecodedSamples],
        chunks: deque[list[SampleRow]],
    ) -> Iterator[Batch]:
        """Put decoded chunks together; keep the pool for the next pass if this one is completed."""
        complete = False
        try:
            for number, sources in zip(range(first, len(self)), self._caption_sources(epoch, first), strict=False):
                batch = self._batch(epoch, decoded, chunks, sources)
                complete = number == len(self) - 1
                yield batch
        finally:
            # It may be suspended after its last job, with its window still in memory.
            jobs.close()
            if complete and self._idle is None:
                self._idle = pool
            else:
                pool.close()

    def _batch(
        self,
        epoch: int,
        decoded: Iterator[DecodedSamples],
        chunks: deque[list[SampleRow]],
        caption_sources: np.ndarray | None,
    ) -> Batch:
        size = self._decoder.image_size
        image = torch.empty((self._share.size, 3, size, size), dtype=torch.uint8, pin_memory=self._pin)
        pairs: list[SampleRow] = []
        planned: list[int] = []
        while len(pairs) < self._share.size:
            pixels, unusable = next(decoded)
            chunk, start = chunks.popleft(), len(pairs)
            image[start : start + len(chunk)] = pixels
            self.seen += len(chunk)
            planned += [pair.row for pair in chunk]
            for i, reason in unusable:
                self._count_skipped(chunk[i].sample.key, reason)
                chunk[i], image[start + i] = self._replacement(epoch, chunk[i])
            pairs += chunk
        rows = np.array([pair.row for pair in pairs], np.int64)
        ids = self._texts(epoch, rows, [pair.sample for pair in pairs])
        if caption_sources is not None:
            self._exchange_texts(epoch, ids, caption_sources, np.array(planned))
        labels = [-1 if pair.sample.label is None else pair.sample.label for pair in pairs]
        ids_of_images = image_ids(rows, np.array(labels, np.int64)) if self._labels else rows.copy()
        if self._corruption is not None:
            for i in np.flatnonzero(self._corruption.hits("image", epoch, rows)).tolist():
                image[i] = torch.from_numpy(noise_pixels(self._seed, epoch, int(rows[i]), size))
                ids_of_images[i] = np.iinfo(np.int64).min + rows[i]  # far from every row and label
        arrays = {"ids": ids, "rows": rows, "text_ids": row_hash(ids), "image_ids": ids_of_images}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {"image": image} | {k: t.pin_memory() if self._pin else t for k, t in tensors.items()}  # type: ignore[return-value]

    def _texts(self, epoch: int, rows: np.ndarray, samples: Sequence[Sample]) -> np.ndarray:
        """(k, L) int64 token ids of the caption that each row has in this pass."""
        counts = np.array([len(sample.captions) for sample in samples], np.int64)
        chosen = choose_captions(self._seed, epoch, rows, counts)
        ids = self._tokenizer([sample.captions[i] for sample, i in zip(samples, chosen, strict=True)]).astype(np.int64)
        return ids if self._corruption is None else self._corruption.corrupt_texts(epoch, rows, ids)

    def _exchange_texts(self, epoch: int, ids: np.ndarray, sources: np.ndarray, planned: np.ndarray) -> None:
        """Write the texts of the (B,) rows `sources` into the (B, L) ids, where they are other rows than planned."""
        moved = sources != planned
        if moved.any():
            unique, place = np.unique(sources[moved], return_inverse=True)
            ids[moved] = self._texts(epoch, unique, self._rows.read(unique))[place]

    def _augment_seed(self, epoch: int, row: int) -> tuple[int, ...]:
        return self._seed, epoch, 3, row

    def _count_skipped(self, key: str, reason: str) -> None:
        self._first_skipped = self._first_skipped or f"{key!r}: {reason}"
        self.skipped[reason] += 1
        bad = self.skipped.total()
        if bad >= _MIN_SKIPPED and bad > self._max_skipped * self.seen:
            raise UserError(
                f"{bad} of {self.seen} images ({bad / self.seen:.1%}) could not be used, more than data.max_skipped "
                f"({self._max_skipped:.1%}); the first is {self._first_skipped}. Fix the images, or raise "
                "data.max_skipped"
            )

    def _replacement(self, epoch: int, pair: SampleRow) -> tuple[SampleRow, torch.Tensor]:
        """Another row for one whose image is unusable, and its pixels."""
        rng = np.random.default_rng((self._seed, epoch, 4, pair.row))
        for _ in range(_TRIES):
            row, sample = pair.replacements[rng.integers(len(pair.replacements))]
            try:
                pixels = self._decoder(sample, self._augment_seed(epoch, row))
            except BadImage:
                continue
            return SampleRow(row, sample, pair.replacements), pixels
        raise UserError(
            f"{self._source.name}: no usable image was found in {_TRIES} tries to replace one; the first unusable one "
            f"is {self._first_skipped}. Fix the images"
        )
