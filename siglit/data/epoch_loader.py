"""From caches to training batches: shuffled rows with one caption each, the same global order for any number of ranks.

Knows caches and token ids, not towers; the order is drawn in `shuffle.py`. `pictures.py` does the same with images.
Shapes: B pairs per rank, G = B · W pairs over W ranks, D embedding width, S × S pixels, L tokens, M captions.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, Literal, TypedDict

import numpy as np
import torch

from siglit.cache import EmbeddingCache
from siglit.data.corruption import Corruption
from siglit.data.prefetch import Prefetched
from siglit.data.shuffle import Arrays, BlockShuffle, RowShuffle, Share, choose_captions
from siglit.errors import UserError

_logger = logging.getLogger(__name__)

_SHUFFLES: dict[str, type[RowShuffle] | type[BlockShuffle]] = {"rows": RowShuffle, "blocks": BlockShuffle}


class Batch(TypedDict):
    """One rank's pairs."""

    image: torch.Tensor
    """(B, D) float16 embeddings as stored, not normalised; or (B, 3, S, S) uint8 pixels."""
    ids: torch.Tensor
    """(B, L) int64 token ids."""
    rows: torch.Tensor
    """(B,) int64 rows of the cache, or numbers of the source's captioned samples, each of which is one image."""
    text_ids: torch.Tensor
    """(B,) int64, equal where captions are (as the text tower sees them)."""
    image_ids: torch.Tensor
    """(B,) int64, equal where labels are if the loader was given labels, else where images are; a noise image is of
    no label."""


class EpochLoader(ABC):
    """Endless passes over captioned images; one iteration is one pass.

    Pass e visits the rows in an order drawn from (seed, e) and pairs each with one of its captions, drawn from (seed,
    e, row). The global batch is cut evenly into the ranks' parts and an incomplete last one is dropped: the loss is
    exact only for equal parts. A thread makes batches ahead. `state_dict` counts the examples that were handed out,
    never those made ahead, so that a restored loader goes on with the batch that would have followed.

    Attributes:
        shuffle: "rows" or "blocks".
        epoch: number of the current pass.
        examples: handed out of the current pass, over all ranks.
        count: captioned images.
    """

    shuffle: str
    count: int
    _ahead = 2

    def __init__(
        self,
        name: str,
        *,
        batch_size: int,
        seed: int,
        shuffle: str,
        auto_shuffle: bool,
        rank: int,
        world_size: int,
        corruption: Corruption | None = None,
    ):
        """Take what `CacheLoader` takes; `name` is what the images come from, for messages.

        Raises:
            UserError: the batch cannot be divided among the ranks, or there are fewer captioned images than that.
        """
        if batch_size % world_size:
            raise UserError(f"train.batch_size {batch_size} cannot be shared evenly by {world_size} devices")
        self._seed, self._share, self._auto_shuffle = seed, Share(batch_size, rank, world_size), auto_shuffle
        self._corruption = corruption
        self._running: Prefetched[Batch] | None = None
        self.epoch = self.examples = 0
        self._reshuffle(shuffle)
        if self.count < batch_size:
            raise UserError(
                f"{name} has {self.count} images with captions, fewer than one batch; "
                f"lower train.batch_size from {batch_size} to {self.count} or less"
            )

    @abstractmethod
    def keys(self, rows: Sequence[int]) -> list[str]:
        """The keys of rows as batches name them."""

    @abstractmethod
    def _reshuffle(self, shuffle: str) -> None:
        """Set `shuffle` and `count`."""

    @abstractmethod
    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Make this rank's batches of a pass, from number `first` on."""

    def close(self) -> None:
        """Break off the pass under way, also where a traceback keeps its iterator alive."""
        if self._running is not None:
            self._running.close()

    def __len__(self) -> int:
        """Batches in one pass."""
        return self.count // self._share.total

    def __iter__(self) -> Iterator[Batch]:
        """Hand out the rest of the current pass, then make the next one current."""
        first = self.examples // self._share.total
        # The thread alone holds what makes the batches, which so ends with it.
        with closing(Prefetched(self._batches(self.epoch, first), self._ahead)) as batches:
            self._running = batches
            for batch in batches:
                self.examples += self._share.total
                # Before the last batch is out: who counts batches never asks for more.
                if self.examples == len(self) * self._share.total:
                    self.epoch, self.examples = self.epoch + 1, 0
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position: the pass, and the examples of it that were handed out; and what the order was drawn from."""
        return {"epoch": self.epoch, "examples": self.examples, **self._drawn_from()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position; the number of ranks may be another, the global batch may not, not even between passes.

        Raises:
            UserError: the position counts other batches than these.
        """
        asked = state.get("train.shuffle")
        if self._auto_shuffle and asked in _SHUFFLES and asked != self.shuffle:
            self._reshuffle(asked)
        for name, here in self._drawn_from().items():
            if state.get(name) != here:
                raise UserError(
                    f"the checkpoint was made with {name} {state.get(name)}, but it is {here} now: the batches would "
                    "be others. Resume with the same, or start anew with another --output_dir"
                )
        self.epoch, self.examples = state["epoch"], state["examples"]

    def _drawn_from(self) -> dict[str, Any]:
        return {
            "train.batch_size": self._share.total,
            "seed": self._seed,
            "train.shuffle": self.shuffle,
            "number of captioned images": self.count,
            "data.corrupt": None if self._corruption is None else str(self._corruption),
        }


class CacheLoader(EpochLoader):
    """Passes over the captioned rows of a cache."""

    def __init__(
        self,
        cache: EmbeddingCache,
        ids: np.ndarray,
        *,
        labels: np.ndarray | None = None,
        batch_size: int,
        seed: int,
        shuffle: Literal["rows", "blocks"] = "rows",
        auto_shuffle: bool = False,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        corruption: Corruption | None = None,
        noise: np.ndarray | None = None,
    ):
        """Prepare the passes.

        Args:
            cache: embeddings and the captions of each row.
            ids: (M, L) token ids of all captions.
            labels: (N,) class of each row, −1 for none, if images of one class are to share an id.
            batch_size: global batch G.
            seed: seed of order and caption choice.
            shuffle: an exact permutation of the rows, or of blocks of rows for caches larger than memory; the same on
                all ranks.
            auto_shuffle: `shuffle` was chosen, not asked for: a restored position brings its own.
            rank: number of this rank.
            world_size: number of ranks W.
            pin_memory: hand out page-locked tensors, which CUDA copies while it computes.
            corruption: what to spoil, for the noise study.
            noise: (P, D) embeddings of noise, see `noise_pool`; needed where images are spoilt.

        Raises:
            UserError: G cannot be divided among the ranks, or the cache has fewer captioned rows than G.
        """
        self._cache, self._ids, self._labels, self._pin = cache, ids, labels, pin_memory
        assert corruption is None or "image" not in corruption.kinds or noise is not None
        self._noise = noise
        super().__init__(
            str(cache.path),
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            auto_shuffle=auto_shuffle,
            rank=rank,
            world_size=world_size,
            corruption=corruption,
        )

    def keys(self, rows: Sequence[int]) -> list[str]:
        """The keys of rows."""
        return [self._cache.key(int(row)) for row in rows]

    def state_dict(self) -> dict[str, Any]:
        """Also the cache that the position counts rows of: its digest, and its path for the message."""
        return {**super().state_dict(), "cache.path": str(self._cache.path), "cache.digest": self._cache.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position in the same cache, wherever that lies now.

        Raises:
            UserError: the position is one in another cache, or counts other batches than these.
        """
        saved, here = state.get("cache.digest"), self._cache.digest
        if saved is None and self._share.rank == 0:
            _logger.warning(
                f"the checkpoint does not record the cache it was trained on: {self._cache.path} is taken for it"
            )
        if saved not in (None, here):
            raise UserError(
                f"the checkpoint was trained on the cache {state.get('cache.path')} (digest {saved[:8]}), but "
                f"{self._cache.path} (digest {here[:8]}) holds other embeddings or captions. Set cache.path back, or "
                "start anew with another --output_dir"
            )
        super().load_state_dict(state)

    def _reshuffle(self, shuffle: str) -> None:
        self.shuffle = shuffle
        self._order: RowShuffle | BlockShuffle = _SHUFFLES[shuffle](self._cache.caption_offsets, self._seed)
        self.count = self._order.count

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        def fetch(rows: np.ndarray) -> Arrays:
            return {"rows": rows, "ids": self._texts(epoch, rows), **self._images(epoch, rows)}

        for arrays in self._exchanged(self._order.batches(epoch, first, self._share, fetch), epoch, first):
            arrays["ids"] = arrays["ids"].astype(np.int64)
            arrays["text_ids"] = row_hash(arrays["ids"])
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            yield {name: tensor.pin_memory() if self._pin else tensor for name, tensor in tensors.items()}  # type: ignore[misc]

    def _images(self, epoch: int, rows: np.ndarray) -> Arrays:
        image = self._cache.gather(rows)
        found = rows if self._labels is None else image_ids(rows, self._labels[rows])
        if self._corruption is not None and self._noise is not None:
            hit, number = self._corruption.noise_numbers(epoch, rows, len(self._noise))
            image[hit] = self._noise[number]
            # Far from every row, label and -1 - row.
            found = found.copy()
            found[hit] = np.iinfo(np.int64).min + number
        return {"image": image, "image_ids": found}

    def _texts(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """(k, L) token ids of the caption that each row has in this pass."""
        start, end = self._cache.caption_offsets[rows], self._cache.caption_offsets[rows + 1]
        ids = self._ids[start + choose_captions(self._seed, epoch, rows, end - start)]
        return ids if self._corruption is None else self._corruption.texts(epoch, rows, ids)

    def _exchanged(self, batches: Iterator[Arrays], epoch: int, first: int) -> Iterator[Arrays]:
        """Give the pairs whose alignment is spoilt the texts of one another, over all ranks.

        Who is in the whole batch is known on every rank without a message: the order is drawn a second time, for which
        `RowShuffle` takes its memory twice.
        """
        if self._corruption is None or "alignment" not in self._corruption.kinds:
            yield from batches
            return
        whole = self._order.batches(epoch, first, Share(self._share.total), lambda rows: {"rows": rows})
        own = slice(self._share.rank * self._share.own, (self._share.rank + 1) * self._share.own)
        for arrays, everyone in zip(batches, whole, strict=True):
            givers = self._corruption.givers(epoch, everyone["rows"])[own]
            moved = givers != arrays["rows"]
            arrays["ids"][moved] = self._texts(epoch, givers[moved])
            yield arrays


def image_ids(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(k,) int64, equal where labels are; a row without one (−1) is a class of its own."""
    return np.where(labels < 0, -1 - rows, labels)


def row_hash(ids: np.ndarray) -> np.ndarray:
    """(k,) int64 of (k, L) token ids: a random linear form modulo 2^64, equal for equal rows."""
    weights = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, ids.shape[1], endpoint=True) | 1
    # Not a sum of products: those would be as many numbers again as a batch has ids.
    return ids.astype(np.int64, copy=False) @ weights
