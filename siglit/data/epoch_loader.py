"""Endless passes over shuffled rows with one caption each: batches, position, and what identifies the order.

Knows neither caches nor images: `cache_loader.py` and `image_loader.py` make the batches, in the orders of `shuffle.py`
and `order.py`. Shapes: B pairs per rank, G = B · W pairs over W ranks, D embedding width, S × S pixels, L tokens.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, Protocol, TypedDict

import numpy as np
import torch

from siglit.data.corruption import Corruption
from siglit.data.order import RankShare
from siglit.data.prefetch import Prefetched
from siglit.errors import UserError


class Batch(TypedDict):
    """One rank's pairs."""

    image: torch.Tensor
    """(B, D) float16 embeddings as stored, not normalized; or (B, 3, S, S) uint8 pixels."""
    ids: torch.Tensor
    """(B, L) int64 token ids."""
    rows: torch.Tensor
    """(B,) int64 rows of the cache, or numbers of the source's captioned samples, each of which is one image."""
    text_ids: torch.Tensor
    """(B,) int64, equal for captions of equal token ids."""
    image_ids: torch.Tensor
    """(B,) int64, equal for images of one label if the loader has labels, else for the same image; noise images have
    ids of their own."""


class Order(Protocol):
    """The order of rows in each pass."""

    count: int

    def global_batches(self, epoch: int, first: int, size: int) -> Iterator[np.ndarray]:
        """Yield the (size,) int64 rows of each global batch of a pass, from number `first` on."""


class EpochLoader(ABC):
    """Endless passes over captioned images; one iteration is one pass.

    Pass e visits the rows in an order drawn from (seed, e) and pairs each with one of its captions, drawn from (seed,
    e, row). The global batch is cut evenly into the ranks' parts and an incomplete last one is dropped: the loss is
    exact only for equal parts. A thread makes batches ahead. `state_dict` counts the examples that were handed out,
    never those made ahead, so that a restored loader continues with the batch that would have followed.

    Attributes:
        shuffle: "rows" or "blocks".
        epoch: number of the current pass.
        examples: handed out of the current pass, over all ranks.
        count: captioned images.
    """

    shuffle: str
    count: int
    _order: Order
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
            UserError: train.batch_size is not divisible by the number of ranks, or larger than the number of captioned
                images.
        """
        if batch_size % world_size != 0:
            raise UserError(f"train.batch_size {batch_size} cannot be shared evenly by {world_size} devices")
        self._seed, self._share, self._auto_shuffle = seed, RankShare(batch_size, rank, world_size), auto_shuffle
        self._corruption = corruption
        self._running: Prefetched[Batch] | None = None
        self.epoch = self.examples = 0
        self._set_shuffle(shuffle)
        if self.count < batch_size:
            raise UserError(
                f"{name} has {self.count} images with captions, fewer than one batch; "
                f"lower train.batch_size from {batch_size} to {self.count} or less"
            )

    @abstractmethod
    def keys(self, rows: Sequence[int]) -> list[str]:
        """The keys of rows as batches name them."""

    @abstractmethod
    def _set_shuffle(self, shuffle: str) -> None:
        """Set `shuffle`, the order and `count`."""

    @abstractmethod
    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Make this rank's batches of a pass, from number `first` on."""

    def close(self) -> None:
        """Stop the current pass, also where a traceback keeps its iterator alive."""
        if self._running is not None:
            self._running.close()

    def __len__(self) -> int:
        """Batches in one pass."""
        return self.count // self._share.global_size

    def __iter__(self) -> Iterator[Batch]:
        """Hand out the rest of the current pass, then make the next one current."""
        first = self.examples // self._share.global_size
        # Only the thread holds the iterator that makes the batches, so that the iterator ends with the thread.
        with closing(Prefetched(self._batches(self.epoch, first), self._ahead)) as batches:
            self._running = batches
            for batch in batches:
                self.examples += self._share.global_size
                # Before the last batch is out: a caller that counts batches never requests another.
                if self.examples == len(self) * self._share.global_size:
                    self.epoch, self.examples = self.epoch + 1, 0
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position: the pass, and the examples of it that were handed out; and what the order was drawn from."""
        return {"epoch": self.epoch, "examples": self.examples, **self._drawn_from()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a position; the number of ranks may differ, the global batch may not, not even between passes.

        Raises:
            UserError: the position counts other batches: batch size, seed, shuffle, corruption or the number of
                captioned images differs.
        """
        saved_shuffle = state.get("train.shuffle")
        if self._auto_shuffle and saved_shuffle in ("rows", "blocks") and saved_shuffle != self.shuffle:
            self._set_shuffle(saved_shuffle)
        for name, actual in self._drawn_from().items():
            if state.get(name) != actual:
                raise UserError(
                    f"the checkpoint was made with {name} {state.get(name)}, but it is {actual} now: the batches would "
                    "differ. Resume with the same value, or start a new run with another --output_dir"
                )
        self.epoch, self.examples = state["epoch"], state["examples"]

    def _drawn_from(self) -> dict[str, Any]:
        return {
            "train.batch_size": self._share.global_size,
            "seed": self._seed,
            "train.shuffle": self.shuffle,
            "number of captioned images": self.count,
            "data.corrupt": None if self._corruption is None else str(self._corruption),
        }

    def _caption_sources(self, epoch: int, first: int) -> Iterator[np.ndarray | None]:
        """For each batch the (B,) rows whose texts this rank's pairs get; None where each pair keeps its own.

        The order is drawn a second time, and takes its memory twice, so that every rank knows the whole batch without
        communication.
        """
        if self._corruption is None or "alignment" not in self._corruption.kinds:
            yield from itertools.repeat(None)
        for rows in self._order.global_batches(epoch, first, self._share.global_size):
            assert self._corruption is not None
            yield self._corruption.caption_sources(epoch, rows)[self._share.slice]


def image_ids(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(k,) int64: the label of each row, or −1 − row, equal to no other id, where it has none (−1)."""
    return np.where(labels < 0, -1 - rows, labels)


def row_hash(ids: np.ndarray) -> np.ndarray:
    """(k,) int64 of (k, L) token ids: a random linear form modulo 2^64, equal for equal rows."""
    weights = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, ids.shape[1], endpoint=True) | 1
    # A matrix product, as the elementwise one would take as much memory again as the ids of the batch.
    return ids.astype(np.int64, copy=False) @ weights
