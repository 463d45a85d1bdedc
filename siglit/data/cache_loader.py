"""Training batches from a cache: embeddings, token ids, and ids of equal images and texts.

Knows caches and token ids, not towers; the order is drawn in `shuffle.py`. Shapes: B pairs per rank, G = B · W pairs
over W ranks, N rows of the cache, D embedding width, L tokens, M captions, P noise embeddings.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from typing_extensions import override

from siglit.cache import EmbeddingCache
from siglit.data.corruption import Corruption
from siglit.data.epoch_loader import Batch, EpochLoader, image_ids, row_hash
from siglit.data.random_hash import choose_captions
from siglit.data.shuffle import Arrays, BlockShuffle, RowShuffle
from siglit.errors import UserError

_logger = logging.getLogger(__name__)

_SHUFFLES: dict[str, type[RowShuffle] | type[BlockShuffle]] = {"rows": RowShuffle, "blocks": BlockShuffle}


class CacheLoader(EpochLoader):
    """Passes over the captioned rows of a cache."""

    _order: RowShuffle | BlockShuffle

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
            auto_shuffle: `shuffle` was chosen automatically: a restored position replaces it.
            rank: number of this rank.
            world_size: number of ranks W.
            pin_memory: hand out page-locked tensors, which CUDA copies while it computes.
            corruption: what to corrupt, for the noise study.
            noise: (P, D) embeddings of noise, see `noise_pool`; needed where images are corrupted.

        Raises:
            UserError: G is not divisible by W, or the cache has fewer captioned rows than G.
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

    @override
    def keys(self, rows: Sequence[int]) -> list[str]:
        return [self._cache.key(int(row)) for row in rows]

    @override
    def state_dict(self) -> dict[str, Any]:
        """Also the cache whose rows the position counts: its digest, and its path for the message."""
        return {**super().state_dict(), "cache.path": str(self._cache.path), "cache.digest": self._cache.digest}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a position in the same cache, wherever that lies now.

        Raises:
            UserError: the position is one in another cache, or counts other batches.
        """
        saved, actual = state.get("cache.digest"), self._cache.digest
        if saved is None and self._share.rank == 0:
            _logger.warning(
                f"the checkpoint does not record the cache it was trained on; assuming that it is {self._cache.path}"
            )
        if saved not in (None, actual):
            raise UserError(
                f"the checkpoint was trained on the cache {state.get('cache.path')} (digest {saved[:8]}), but "
                f"{self._cache.path} (digest {actual[:8]}) holds other embeddings or captions. Set cache.path back, or "
                "start a new run with another --output_dir"
            )
        super().load_state_dict(state)

    @override
    def _set_shuffle(self, shuffle: str) -> None:
        self.shuffle = shuffle
        self._order = _SHUFFLES[shuffle](self._cache.caption_offsets, self._seed)
        self.count = self._order.count

    @override
    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        def fetch(rows: np.ndarray) -> Arrays:
            return {"rows": rows, "ids": self._texts(epoch, rows), **self._images(epoch, rows)}

        batches = self._order.batches(epoch, first, self._share, fetch)
        for arrays, sources in zip(batches, self._caption_sources(epoch, first), strict=False):
            if sources is not None:
                moved = sources != arrays["rows"]
                arrays["ids"][moved] = self._texts(epoch, sources[moved])
            arrays["ids"] = arrays["ids"].astype(np.int64)
            arrays["text_ids"] = row_hash(arrays["ids"])
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            yield {name: tensor.pin_memory() if self._pin else tensor for name, tensor in tensors.items()}  # type: ignore[misc]

    def _images(self, epoch: int, rows: np.ndarray) -> Arrays:
        image = self._cache.gather(rows)
        ids = rows if self._labels is None else image_ids(rows, self._labels[rows])
        if self._corruption is not None and self._noise is not None:
            hit, number = self._corruption.noise_numbers(epoch, rows, len(self._noise))
            image[hit] = self._noise[number]
            # Far from every row, label and -1 - row.
            ids = ids.copy()
            ids[hit] = np.iinfo(np.int64).min + number
        return {"image": image, "image_ids": ids}

    def _texts(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """(k, L) token ids of the caption that each row has in this pass."""
        start, end = self._cache.caption_offsets[rows], self._cache.caption_offsets[rows + 1]
        ids = self._ids[start + choose_captions(self._seed, epoch, rows, end - start)]
        return ids if self._corruption is None else self._corruption.corrupt_texts(epoch, rows, ids)
