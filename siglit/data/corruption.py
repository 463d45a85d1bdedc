"""The noise study: which images and texts are replaced by noise, and which pairs exchange their texts.

Knows rows, token ids and pixels, not caches, towers or ranks. All of it is a hash of (seed, pass, row), so that it is
the same for any number of ranks and workers and after a resumed run, and nothing has to be kept.
Shapes: k rows, L tokens, G pairs of a global batch over all ranks, P noise images, H = W pixels, D embedding width.

Source: section 4.9 of the paper (arXiv:2303.15343). As there, the pairs of a batch that lose their alignment are
shuffled among themselves: a text's own image stays in its batch as a false negative, which a caption from elsewhere
would leave out. Unlike there, they are not a fixed part of the batch: every pair is one of them with probability p.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from siglit.config import DataConfig
from siglit.data.random_hash import below, draw
from siglit.data.saved_array import load_saved
from siglit.models.tokenizer import Tokenizer
from siglit.runtime.files import append_checksum, write_bytes

_KINDS = ("image", "text", "alignment")
# Words of the hash, one for each use; the hits of the kinds have the first ones.
_NUMBER, _LENGTH, _PIECE, _PLACE, _PIXEL = range(len(_KINDS), len(_KINDS) + 5)
_EMBED_AT_ONCE = 32


@dataclass(frozen=True)
class Corruption:
    """What to corrupt, and how often.

    Each kind hits a pair in a pass with probability `share`, independently of the other kinds and pairs. A random text
    belongs to its row and moves with it where pairs are exchanged.
    """

    kinds: frozenset[str]
    """Some of image, text, alignment."""
    share: float
    """Probability of each, 0.0–1.0."""
    seed: int
    vocab_size: int
    eos_id: int
    pad_id: int

    def __post_init__(self) -> None:
        assert self.kinds <= set(_KINDS)
        assert self.vocab_size > len({self.eos_id, self.pad_id})

    def __str__(self) -> str:
        return f"{', '.join(sorted(self.kinds))} (data.corrupt_share {self.share})"

    def hits(self, kind: str, epoch: int, rows: np.ndarray) -> np.ndarray:
        """(k,) bool, which of the (k,) rows this kind corrupts in the pass; none if it is not among `kinds`."""
        if kind not in self.kinds:
            return np.zeros(len(rows), bool)
        return (draw(self.seed, epoch, _KINDS.index(kind), rows) >> np.uint64(11)) * 2.0**-53 < self.share

    def corrupt_texts(self, epoch: int, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Put random tokens in place of the texts that are hit.

        A random text has 1 … L − 1 tokens, all lengths equally likely, each drawn from the vocabulary without
        end-of-sentence and padding; then end-of-sentence, then padding. A token that a tokenizer puts at the beginning,
        such as [CLS], is not kept.

        Args:
            epoch: number of the pass.
            rows: (k,) int64.
            ids: (k, L) token ids of the rows' captions, L at least 2.

        Returns:
            (k, L) of the same dtype; `ids` itself if "text" is not among `kinds`.
        """
        if "text" not in self.kinds:
            return ids
        hit = self.hits("text", epoch, rows)
        corrupted, places = rows[hit, None], np.arange(ids.shape[1])
        lengths = 1 + below(ids.shape[1] - 1, draw(self.seed, epoch, _LENGTH, corrupted))
        special = sorted({self.eos_id, self.pad_id})
        pieces = below(self.vocab_size - len(special), draw(self.seed, epoch, _PIECE, corrupted, places))
        for number in special:
            pieces += pieces >= number
        ends = np.where(places == lengths, self.eos_id, self.pad_id)
        ids = ids.copy()
        ids[hit] = np.where(places < lengths, pieces, ends)
        return ids

    def caption_sources(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Shuffle the texts of the pairs that are hit among them.

        Args:
            epoch: number of the pass.
            rows: (G,) int64, all rows of the global batch in its order, without repetition.

        Returns:
            (G,) int64, the row of the batch whose text each pair gets: its own, or where it is hit one of a random
            permutation of the hit rows.
        """
        hit = self.hits("alignment", epoch, rows)
        sources = rows.copy()
        sources[hit] = rows[hit][np.argsort(draw(self.seed, epoch, _PLACE, rows[hit]))]
        return sources

    def noise_numbers(self, epoch: int, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(k,) bool, which images are hit; and for those a number in [0, count), that of the noise to put there."""
        hit = self.hits("image", epoch, rows)
        return hit, below(count, draw(self.seed, epoch, _NUMBER, rows[hit]))


def corruption_of(data: DataConfig, seed: int, tokenizer: Tokenizer) -> Corruption | None:
    """The corruption of an experiment (data.corrupt); None if it has none."""
    if len(data.corrupt) == 0:
        return None
    return Corruption(
        frozenset(data.corrupt), data.corrupt_share, seed, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id
    )


def noise_pixels(seed: int, epoch: int, row: int, image_size: int) -> np.ndarray:
    """(3, H, W) uint8 of uniform random noise, to put in place of the row's image in the pass."""
    count = 3 * image_size**2
    words = draw(seed, epoch, _PIXEL, row, np.arange(-(-count // 8)))
    return words.astype("<u8").view(np.uint8)[:count].reshape(3, image_size, image_size)


def noise_pool(
    folder: Path,
    image_tower: Mapping[str, Any],
    embed: Callable[[np.ndarray], np.ndarray],
    *,
    image_size: int,
    dim: int,
    seed: int,
    count: int = 256,
) -> np.ndarray:
    """Return embeddings of noise images for training on a cache, from their file or computed now.

    The paper draws a new noise image every time; without the tower in training there is a pool of them, drawn from with
    replacement. The file's name is a hash of tower, seed and count, and the file is written whole or not at all: a
    resumed run has the very same rows.

    Args:
        folder: where the file is kept, such as the run's.
        image_tower: fingerprint of the tower that made the cache.
        embed: that tower, (n, 3, H, W) uint8 pixels to (n, D) rows; called only if there is no file.
        image_size: H = W, the tower's.
        dim: D, the cache's.
        seed: of the run.
        count: P.

    Returns:
        (P, D) float16.

    Raises:
        OSError: the file could not be written; the message gives the reason.
    """
    identity = json.dumps([dict(image_tower), image_size, seed, count], sort_keys=True)
    path = Path(folder) / f"noise-{hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()}.npy"
    saved = load_saved(path, (count, dim), np.float16)
    if saved is not None:
        return saved
    parts = [range(first, min(first + _EMBED_AT_ONCE, count)) for first in range(0, count, _EMBED_AT_ONCE)]
    pool = np.concatenate(
        [embed(np.stack([noise_pixels(seed, 0, number, image_size) for number in part])) for part in parts]
    ).astype(np.float16)
    assert pool.shape == (count, dim)
    data = io.BytesIO()
    np.save(data, pool)
    append_checksum(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data.getvalue())
    return pool
