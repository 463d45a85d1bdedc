"""From a source to training batches of images, for towers that learn: decoded anew in every pass, by worker processes.

Knows sources, captions and pixels, not towers. A *row* is a captioned sample, numbered through in the source's order;
a *unit* is a stretch of rows that is read at one go. Shapes: B pairs per rank, G = B · W pairs over W ranks, S × S
pixels, L tokens.
"""

import itertools
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Literal, NamedTuple

import numpy as np
import torch

from siglit.cache import find_duplicate, hash_keys
from siglit.data.corruption import Corruption, noise_pixels
from siglit.data.decoding import Decoded, Decoder, Decoding, Job
from siglit.data.epoch_loader import Batch, EpochLoader, image_ids, row_hash
from siglit.data.images import BadImage
from siglit.data.prefetch import Prefetched
from siglit.data.shuffle import choose_captions
from siglit.data.sources import Sample, Source
from siglit.errors import UserError
from siglit.models.tokenizer import Tokenizer
from siglit.runtime.progress import Meter

UNIT_SAMPLES = 1024
WINDOW_UNITS = 16
SPARES = 1024
"""Samples of a window, at most, that stand in for its unusable images."""
CHUNK = 32
"""Images that a worker decodes at one go."""

_TRIES = 100
_FEW = 10
"""Unusable images that are no reason to stop yet, whatever their share."""


class ImageLoader(EpochLoader):
    """Passes over the captioned samples of a source, their images decoded and augmented in worker processes.

    `shuffle: rows` keeps all samples in memory (where their image is a file, or lies in a tar, its place; else its
    bytes) and permutes them exactly. `blocks` takes the units in random order and mixes their samples within windows
    of 16 units; a window is read while the one before it is dealt out, and two are in memory, each with this rank's
    samples alone. Pixels, pairs and their order depend on seed, pass and row, not on ranks, workers or a resumption.

    In place of an unusable image comes another pair of its window, drawn from (seed, pass, row), so that a batch is
    always whole. One batch is made ahead, and two chunks per worker.

    Attributes:
        seen: images that this rank came by since it was made, unusable ones included.
        skipped: the unusable ones among them, by reason.
    """

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
            auto_shuffle: `shuffle` was chosen, not asked for: a restored position brings its own.
            rank: number of this rank.
            world_size: number of ranks W.
            pin_memory: hand out page-locked tensors, which CUDA copies while it computes.
            corruption: what to spoil, for the noise study.

        Raises:
            UserError: the source cannot be read, a key occurs twice, G cannot be divided among the ranks, or there are
                fewer captioned samples than G. A pass raises it when too many images are unusable.
        """
        self._source, self._tokenizer, self._decoder = source, tokenizer, decoder
        self._workers, self._max_skipped, self._labels, self._pin = workers, max_skipped, labels, pin_memory
        self._idle: Decoding | None = None
        self._busy: Decoding | None = None
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

    def __iter__(self) -> Iterator[Batch]:
        """Hand out the rest of the current pass, then make the next one current.

        Worker processes stay for the next pass, but not where this one is broken off.
        """
        epoch = self.epoch
        try:
            yield from super().__iter__()
        finally:
            if self.epoch == epoch:
                self._end_idle()

    def keys(self, rows: Sequence[int]) -> list[str]:
        """The keys of rows; reads their units again unless all samples are in memory."""
        unique, place = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        found = self._rows.read(unique)
        return [found[i].key for i in place]

    def close(self) -> None:
        """End the worker processes, those at work and those that wait for another pass."""
        super().close()
        self._end_idle()
        if self._busy is not None:
            self._busy.close()
            self._busy = None

    def _end_idle(self) -> None:
        if self._idle is not None:
            self._idle.close()
            self._idle = None

    def _reshuffle(self, shuffle: str) -> None:
        self.shuffle = shuffle
        self._rows = _Rows(self._source, hold=shuffle == "rows", quiet=self._share.rank > 0)
        self.count = self._rows.count

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        dealt: deque[list[_Pair]] = deque()
        jobs = self._jobs(epoch, first, dealt)
        self._busy = decoding = self._idle or Decoding(self._decoder, self._workers)
        self._idle = None
        # Here and not in the thread that makes the batches: the processes are forked before there are threads.
        decoded = decoding.run(jobs)
        return self._made(epoch, first, decoding, decoded, dealt, jobs)

    def _made(
        self,
        epoch: int,
        first: int,
        decoding: Decoding,
        decoded: Iterator[Decoded | UserError],
        dealt: "deque[list[_Pair]]",
        jobs: Iterator[Job | UserError],
    ) -> Iterator[Batch]:
        whole = False
        try:
            for number, givers in zip(range(first, len(self)), self._givers(epoch, first), strict=False):
                batch = self._batch(epoch, decoded, dealt, givers)
                whole = number == len(self) - 1
                yield batch
        finally:
            # It may wait behind its last job, its window still in memory.
            jobs.close()  # type: ignore[attr-defined]
            if whole and self._idle is None:
                self._idle = decoding
            else:
                decoding.close()

    def _jobs(self, epoch: int, first: int, dealt: "deque[list[_Pair]]") -> Iterator[Job | UserError]:
        """Cut this rank's pairs at the ends of batches and chunks; `dealt` remembers which are under way.

        What the source finds wrong takes the place of a job, so that all batches before it are handed out.
        """
        try:
            yield from self._cut(epoch, first, dealt)
        except UserError as error:
            yield error

    def _cut(self, epoch: int, first: int, dealt: "deque[list[_Pair]]") -> Iterator[Job]:
        with closing(self._pairs(epoch, first)) as pairs:  # type: ignore[type-var]
            for _ in range(first, len(self)):
                for start in range(0, self._share.own, CHUNK):
                    part = list(itertools.islice(pairs, min(CHUNK, self._share.own - start)))
                    dealt.append(part)
                    yield Job([pair.sample for pair in part], [self._augmented_by(epoch, pair.row) for pair in part])
                    del part

    def _pairs(self, epoch: int, first: int) -> "Iterator[_Pair]":
        with closing(Prefetched(self._windows(epoch, first), ahead=1)) as windows:
            for window in windows:
                yield from window.pairs()
                # The thread may read on as soon as the next one is taken, and then this one would be a third.
                del window

    def _drawn(self, epoch: int, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of all ranks, window by window from the one of batch `first` on, and the place where each begins."""
        order = np.random.default_rng((self._seed, epoch, 0)).permutation(self._rows.units)
        size = len(order) if self.shuffle == "rows" else WINDOW_UNITS
        end = 0
        for number, start in enumerate(range(0, len(order), size)):
            rows = self._rows.of_units(order[start : start + size])
            begin, end = end, end + len(rows)
            if end > first * self._share.total:
                np.random.default_rng((self._seed, epoch, 2, number)).shuffle(rows)
                yield begin, rows

    def _givers(self, epoch: int, first: int) -> Iterator[np.ndarray | None]:
        """For each batch the (B,) rows whose texts this rank's pairs are handed; None where each keeps its own."""
        if self._corruption is None or "alignment" not in self._corruption.kinds:
            yield from itertools.repeat(None)
        share, left = self._share, np.empty(0, np.int64)
        for begin, rows in self._drawn(epoch, first):
            left = np.concatenate([left, rows[max(0, first * share.total - begin) :]])
            while len(left) >= share.total:
                everyone, left = left[: share.total], left[share.total :]
                assert self._corruption is not None
                yield self._corruption.givers(epoch, everyone)[share.rank * share.own :][: share.own]

    def _windows(self, epoch: int, first: int) -> "Iterator[_Window]":
        """This rank's windows of the pass, from the one of batch `first` on."""
        share = self._share
        for begin, rows in self._drawn(epoch, first):
            place = np.arange(begin, begin + len(rows))
            own = place % share.total // share.own == share.rank
            own &= (place >= first * share.total) & (place < len(self) * share.total)
            yield _Window(self._rows, rows[own], rows[:SPARES])

    def _batch(
        self,
        epoch: int,
        decoded: Iterator[Decoded | UserError],
        dealt: "deque[list[_Pair]]",
        givers: np.ndarray | None,
    ) -> Batch:
        own, size = self._share.own, self._decoder.image_size
        image = torch.empty((own, 3, size, size), dtype=torch.uint8, pin_memory=self._pin)
        pairs: list[_Pair] = []
        planned: list[int] = []
        while len(pairs) < own:
            found = next(decoded)
            if isinstance(found, UserError):
                raise found
            chunk, start = dealt.popleft(), len(pairs)
            image[start : start + len(chunk)] = found.pixels
            self.seen += len(chunk)
            planned += [pair.row for pair in chunk]
            for i, reason in found.unusable:
                self._count_skipped(chunk[i].sample.key, reason)
                chunk[i], image[start + i] = self._stand_in(epoch, chunk[i])
            pairs += chunk
        rows = np.array([pair.row for pair in pairs], np.int64)
        ids = self._texts(epoch, rows, [pair.sample for pair in pairs])
        if givers is not None:
            moved = givers != np.array(planned)
            if moved.any():
                unique, place = np.unique(givers[moved], return_inverse=True)
                ids[moved] = self._texts(epoch, unique, self._rows.read(unique))[place]
        labels = [-1 if pair.sample.label is None else pair.sample.label for pair in pairs]
        of_images = image_ids(rows, np.array(labels, np.int64)) if self._labels else rows.copy()
        if self._corruption is not None:
            for i in np.flatnonzero(self._corruption.hits("image", epoch, rows)).tolist():
                image[i] = torch.from_numpy(noise_pixels(self._seed, epoch, int(rows[i]), size))
                of_images[i] = np.iinfo(np.int64).min + rows[i]  # far from every row and label
        arrays = {"ids": ids, "rows": rows, "text_ids": row_hash(ids), "image_ids": of_images}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {"image": image} | {k: t.pin_memory() if self._pin else t for k, t in tensors.items()}  # type: ignore[return-value]

    def _texts(self, epoch: int, rows: np.ndarray, samples: Sequence[Sample]) -> np.ndarray:
        """(k, L) int64 token ids of the caption that each row has in this pass."""
        counts = np.array([len(sample.captions) for sample in samples], np.int64)
        chosen = choose_captions(self._seed, epoch, rows, counts)
        ids = self._tokenizer([sample.captions[i] for sample, i in zip(samples, chosen, strict=True)]).astype(np.int64)
        return ids if self._corruption is None else self._corruption.texts(epoch, rows, ids)

    def _augmented_by(self, epoch: int, row: int) -> tuple[int, ...]:
        return self._seed, epoch, 3, row

    def _count_skipped(self, key: str, reason: str) -> None:
        self._first_skipped = self._first_skipped or f"{key!r}: {reason}"
        self.skipped[reason] += 1
        bad = self.skipped.total()
        if bad >= _FEW and bad > self._max_skipped * self.seen:
            raise UserError(
                f"{bad} of {self.seen} images ({bad / self.seen:.1%}) could not be used, more than data.max_skipped "
                f"({self._max_skipped:.1%}); the first is {self._first_skipped}. Mend the images, or raise "
                "data.max_skipped"
            )

    def _stand_in(self, epoch: int, pair: "_Pair") -> "tuple[_Pair, torch.Tensor]":
        draw = np.random.default_rng((self._seed, epoch, 4, pair.row))
        for _ in range(_TRIES):
            row, sample = pair.spares[draw.integers(len(pair.spares))]
            try:
                return _Pair(row, sample, pair.spares), self._decoder(sample, self._augmented_by(epoch, row))
            except BadImage:
                continue
        raise UserError(
            f"{self._source.name}: no usable image was found in {_TRIES} tries to replace one; the first unusable one "
            f"is {self._first_skipped}. Mend the images"
        )


class _Pair(NamedTuple):
    row: int
    sample: Sample
    spares: list[tuple[int, Sample]]
    """Rows of the same window that may stand in for this one."""


class _Rows:
    """The captioned samples of a source, held in memory or read unit by unit."""

    def __init__(self, source: Source, *, hold: bool, quiet: bool):
        self._source, self._units = source, source.units(UNIT_SAMPLES)
        self._held: list[list[Sample]] = []
        counts, hashes = [], []
        with Meter(f"reading {source.name}", None, "captioned samples", quiet=quiet) as meter:
            for number in range(len(self._units)):
                samples = self._load(number)
                counts.append(len(samples))
                hashes.append(hash_keys([sample.key for sample in samples]))
                if hold:
                    self._held.append([sample.carried() for sample in samples])
                meter.advance(len(samples))
        self._check_unique(hashes)
        self._first = np.concatenate([[0], np.cumsum(np.array(counts, np.int64))])
        self.units, self.count = len(self._units), int(self._first[-1])

    def of_units(self, numbers: np.ndarray) -> np.ndarray:
        """Rows of units, int64."""
        return np.concatenate([np.arange(self._first[n], self._first[n + 1]) for n in numbers])

    def read(self, rows: np.ndarray) -> list[Sample]:
        """The samples of ascending rows; no image is read."""
        found: list[Sample] = []
        # The last of equal starts: an empty unit starts where its successor does.
        units = np.unique(np.searchsorted(self._first, rows, side="right") - 1)
        for number, part in zip(
            units.tolist(), np.split(rows, np.searchsorted(rows, self._first[units[1:]])), strict=True
        ):
            samples = self._held[number] if self._held else self._load(number)
            if len(samples) != self._first[number + 1] - self._first[number]:
                raise UserError(
                    f"{self._units[number].name} had {self._first[number + 1] - self._first[number]} captioned samples "
                    f"when training started, but has {len(samples)} now. Train on data that does not change"
                )
            found += [samples[row] for row in part - self._first[number]]
        return found

    def _check_unique(self, hashes: list[np.ndarray]) -> None:
        """Refuse a key in two units: in two tars, or two parquet files of one name; listings compare when opened."""
        found = find_duplicate(hashes, lambda number: [sample.key for sample in self._load(number)])
        if found:
            units = [self._units[part].name for part, _ in (found.first, found.second)]
            raise UserError(
                f"{self._source.name}: the key {found.key!r} occurs twice: in {units[0]} and in {units[1]}. A key "
                "names one image; remove one of the two, or set key_column"
            )

    def _load(self, number: int) -> list[Sample]:
        return [sample for sample in self._source.load(self._units[number]) if sample.captions]


class _Window:
    """Rows in the order in which they are dealt out, and the samples to deal."""

    def __init__(self, everything: _Rows, rows: np.ndarray, spares: np.ndarray):
        unique, place = np.unique(np.concatenate([rows, spares]), return_inverse=True)
        # Ascending, so that every part of a file is read once.
        self._samples = [sample.carried() for sample in everything.read(unique)]
        self._rows, self._place = rows, place[: len(rows)]
        self._spares = [
            (row, self._samples[i]) for row, i in zip(spares.tolist(), place[len(rows) :].tolist(), strict=True)
        ]

    def pairs(self) -> Iterator[_Pair]:
        for row, place in zip(self._rows, self._place, strict=True):
            yield _Pair(int(row), self._samples[place], self._spares)
