"""From caches to training batches: shuffled rows with one caption each, the same global order for any number of ranks.

Knows caches and token ids, not towers. Shapes: B pairs per rank, G = B · W pairs over W ranks, D embedding width, L
tokens.
"""

from collections.abc import Iterator
from typing import TypedDict

import numpy as np
import torch

from siglit.cache import EmbeddingCache
from siglit.errors import UserError


class Batch(TypedDict):
    """One rank's pairs."""

    image: torch.Tensor
    """(B, D) float16 embeddings as stored, not normalised."""
    ids: torch.Tensor
    """(B, L) int64 token ids."""
    rows: torch.Tensor
    """(B,) int64 rows of the cache."""


class TrainBatches:
    """Endless passes over the captioned rows of a cache; one iteration is one pass.

    Pass e visits the rows in an order drawn from (seed, e) and pairs each with one of its captions, drawn from (seed,
    e, row). The global batch is cut evenly into the ranks' parts and an incomplete last one is dropped: the loss is
    exact only for equal parts. `state_dict` counts what was handed out, so that a restored loader goes on with the
    batch that would have followed.
    """

    def __init__(
        self, cache: EmbeddingCache, ids: np.ndarray, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        """Prepare the passes.

        Args:
            cache: embeddings and the captions of each row.
            ids: (M, L) token ids of all captions.
            batch_size: global batch G.
            seed: seed of order and caption choice.
            rank: number of this rank.
            world_size: number of ranks W.

        Raises:
            UserError: G cannot be divided among the ranks, or the cache has fewer captioned rows than G.
        """
        if batch_size % world_size:
            raise UserError(f"train.batch_size {batch_size} cannot be shared evenly by {world_size} devices")
        counts = np.diff(cache.caption_offsets)
        self._rows = np.flatnonzero(counts)
        if len(self._rows) < batch_size:
            raise UserError(
                f"{cache.path} has {len(self._rows)} images with captions, fewer than one batch; "
                f"lower train.batch_size from {batch_size} to {len(self._rows)} or less"
            )
        self._cache, self._ids = cache, ids
        self._global, self._local, self._rank = batch_size, batch_size // world_size, rank
        self._seed, self.epoch, self.consumed = seed, 0, 0

    def __len__(self) -> int:
        """Batches in one pass."""
        return len(self._rows) // self._global

    def __iter__(self) -> Iterator[Batch]:
        """Hand out the rest of the current pass, then make the next one current."""
        order = np.random.default_rng((self._seed, self.epoch, 0)).permutation(len(self._rows))
        chance = np.random.default_rng((self._seed, self.epoch, 1)).random(len(self._rows), dtype=np.float32)
        while self.consumed < len(self):
            start = self.consumed * self._global + self._rank * self._local
            picked = order[start : start + self._local]
            self.consumed += 1
            if self.consumed == len(self):
                self.epoch, self.consumed = self.epoch + 1, 0
                yield self._batch(picked, chance)
                return
            yield self._batch(picked, chance)

    def state_dict(self) -> dict[str, int]:
        """Position: the pass, and the batches of it that were handed out; and what the order was drawn from."""
        return {"epoch": self.epoch, "consumed": self.consumed, **self._order()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position; the number of ranks may be another.

        Raises:
            UserError: the position counts other batches than these.
        """
        for name, here in self._order().items():
            if state[name] != here:
                raise UserError(
                    f"the checkpoint was made with {name} {state[name]}, but it is {here} now: the batches would be "
                    "others. Resume with the same, or start anew with another --output_dir"
                )
        self.epoch, self.consumed = state["epoch"], state["consumed"]

    def _order(self) -> dict[str, int]:
        return {"train.batch_size": self._global, "seed": self._seed, "number of captioned images": len(self._rows)}

    def _batch(self, picked: np.ndarray, chance: np.ndarray) -> Batch:
        rows = self._rows[picked]
        first, last = self._cache.caption_offsets[rows], self._cache.caption_offsets[rows + 1]
        captions = np.minimum(first + (chance[picked] * (last - first)).astype(np.int64), last - 1)
        return {
            "image": torch.from_numpy(self._cache.gather(rows)),
            "ids": torch.from_numpy(self._ids[captions].astype(np.int64)),
            "rows": torch.from_numpy(rows),
        }
