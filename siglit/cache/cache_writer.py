"""Write a cache from embeddings that already exist, added in pieces of any size.

Knows nothing of images or towers.
Shapes: k rows of a piece, D embedding width.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from siglit.cache.format import CacheError, shard_files
from siglit.cache.keys import KnownKeys
from siglit.cache.lock import exclusive
from siglit.cache.shard_writer import finish, remove_unfinished, write_shard


@dataclass
class _Piece:
    embeddings: np.ndarray
    keys: Sequence[str]
    captions: Sequence[Sequence[str]]
    labels: Sequence[int | None]
    langs: Sequence[Sequence[str]]

    def slice(self, start: int, stop: int) -> "_Piece":
        return _Piece(*(getattr(self, name)[start:stop] for name in self.__dataclass_fields__))


class CacheWriter:
    """A new cache, filled row by row; a context manager that completes the cache unless an exception ends the block.

    Holds at most one shard, the piece being added, and 8 bytes per key so far. It does not resume an unfinished cache:
    delete that and start again.

    Raises:
        CacheError: the folder holds shards, another process writes there, or `write_shard` refuses the rows.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any], shard_size: int = 8192) -> None:
        """Prepare; nothing is written before the `with` statement.

        Args:
            folder: the cache's folder.
            fingerprint: the settings that the embeddings were computed with; JSON.
            shard_size: rows per shard; the last one may have fewer.

        Raises:
            CacheError: shard_size is less than 1.
        """
        if shard_size < 1:
            raise CacheError(f"shard_size is {shard_size}; expected at least 1")
        self._folder, self._fingerprint, self._shard_size = Path(folder), dict(fingerprint), shard_size
        self._known_keys = KnownKeys(self._folder)
        self._pieces: list[_Piece] = []
        self._pending = self._shards = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Lock the folder and delete temporary files of killed writers."""
        self._stack.enter_context(exclusive(self._folder))
        if shard_files(self._folder):
            self._stack.close()
            raise CacheError(f"{self._folder} already holds shards; delete it, or write into another folder")
        remove_unfinished(self._folder)
        return self

    def add(
        self,
        embeddings: np.ndarray,
        keys: Sequence[str],
        captions: Sequence[Sequence[str]] | None = None,
        labels: Sequence[int | None] | None = None,
        langs: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Add rows; a shard is committed whenever it is full.

        Args:
            embeddings: (k, D) floats; siglit's own are not normalized. Stored as float16.
            keys: k strings, unique in the cache (checked when a shard is committed).
            captions: k lists of any length; default: no captions.
            labels: k class numbers ≥ 0 or None; default: no labels.
            langs: language codes, parallel to `captions`; default: no languages.

        Raises:
            CacheError: the lengths differ, or `write_shard` refuses a row.
        """
        captions = [()] * len(keys) if captions is None else captions
        labels = [None] * len(keys) if labels is None else labels
        langs = [("",) * len(group) for group in captions] if langs is None else langs
        piece = _Piece(np.asarray(embeddings), keys, captions, labels, langs)
        lengths = {name: len(getattr(piece, name)) for name in piece.__dataclass_fields__}
        if piece.embeddings.ndim != 2 or len(set(lengths.values())) != 1:
            raise CacheError(
                f"the lengths differ: {lengths} (embeddings are {piece.embeddings.shape}, expected (k, D)); "
                "give one embedding, key, list of captions, label and list of languages per row"
            )
        start = 0
        while start < len(keys):
            stop = min(len(keys), start + self._shard_size - self._pending)
            self._pieces.append(piece.slice(start, stop))
            self._pending += stop - start
            start = stop
            if self._pending == self._shard_size:
                self._commit()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the cache unless an exception ended the block."""
        with self._stack:
            if kind is None:
                if self._pending > 0:
                    self._commit()
                if self._shards == 0:
                    raise CacheError(f"{self._folder}: no rows were added; a cache needs at least one")
                finish(self._folder, self._shards, self._fingerprint)

    def _commit(self) -> None:
        pieces = self._pieces
        widths = sorted({piece.embeddings.shape[1] for piece in pieces})
        if len(widths) > 1:
            raise CacheError(f"embeddings have the widths {widths}; expected one width")
        keys = [key for piece in pieces for key in piece.keys]
        self._known_keys.add(self._shards, keys)
        write_shard(
            self._folder,
            self._shards,
            embeddings=np.concatenate([piece.embeddings for piece in pieces]),
            keys=keys,
            captions=[group for piece in pieces for group in piece.captions],
            labels=[label for piece in pieces for label in piece.labels],
            langs=[group for piece in pieces for group in piece.langs],
            fingerprint=self._fingerprint,
        )
        self._shards += 1
        self._pieces, self._pending = [], 0
