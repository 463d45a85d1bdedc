"""Make a cache of embeddings that somebody already has, handed over in pieces of any size.

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
from siglit.cache.writer import finish, remove_unfinished, write_shard


@dataclass
class _Piece:
    embeddings: np.ndarray
    keys: Sequence[str]
    captions: Sequence[Sequence[str]]
    labels: Sequence[int | None]
    langs: Sequence[Sequence[str]]

    def cut(self, start: int, stop: int) -> "_Piece":
        return _Piece(*(getattr(self, name)[start:stop] for name in self.__dataclass_fields__))


class CacheWriter:
    """A new cache, filled row by row; a context manager that completes the cache unless an exception ends it.

    Holds at most a shard, the piece being added, and 8 bytes per key so far. Cannot go on with an unfinished cache:
    delete that and begin again.

    Raises:
        CacheError: the folder holds shards, another process writes there, or rows are not as `write_shard` wants them.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any], shard_size: int = 8192) -> None:
        """Prepare; nothing is written before the `with` statement begins.

        Args:
            folder: where the cache goes.
            fingerprint: what made the embeddings; JSON.
            shard_size: rows per shard; the last one has fewer.
        """
        if shard_size < 1:
            raise CacheError(f"shard_size is {shard_size}, at least 1 was wanted")
        self._folder, self._fingerprint, self._shard_size = Path(folder), dict(fingerprint), shard_size
        self._known_keys = KnownKeys(self._folder)
        self._pieces: list[_Piece] = []
        self._waiting = self._shards = 0
        self._open = ExitStack()

    def __enter__(self) -> Self:
        """Lock the folder."""
        self._open.enter_context(exclusive(self._folder))
        if shard_files(self._folder):
            self._open.close()
            raise CacheError(f"{self._folder} holds shards already; delete it, or write into another folder")
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
        """Add rows; commits whenever a shard is full.

        Args:
            embeddings: (k, D) floats, not normalised by choice of the owner; stored as float16.
            keys: k, unique over the cache (found out when a shard is committed).
            captions: k times any number of captions; default: none.
            labels: k class numbers ≥ 0 or None; default: none.
            langs: language codes, parallel to `captions`; default: none.

        Raises:
            CacheError: the lengths differ, or a row cannot be stored.
        """
        captions = [()] * len(keys) if captions is None else captions
        labels = [None] * len(keys) if labels is None else labels
        langs = [("",) * len(group) for group in captions] if langs is None else langs
        piece = _Piece(np.asarray(embeddings), keys, captions, labels, langs)
        lengths = {name: len(getattr(piece, name)) for name in piece.__dataclass_fields__}
        if piece.embeddings.ndim != 2 or len(set(lengths.values())) != 1:
            raise CacheError(f"rows differ in number: {lengths} (embeddings {piece.embeddings.shape}, (k, D) wanted)")
        start = 0
        while start < len(keys):
            stop = min(len(keys), start + self._shard_size - self._waiting)
            self._pieces.append(piece.cut(start, stop))
            self._waiting += stop - start
            start = stop
            if self._waiting == self._shard_size:
                self._commit()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the cache if no exception came."""
        with self._open:
            if kind is None:
                if self._waiting:
                    self._commit()
                if not self._shards:
                    raise CacheError(f"{self._folder}: no rows were added, a cache has at least one")
                finish(self._folder, self._shards, self._fingerprint)

    def _commit(self) -> None:
        pieces = self._pieces
        if len({piece.embeddings.shape[1] for piece in pieces}) > 1:
            raise CacheError(
                f"rows have {sorted({p.embeddings.shape[1] for p in pieces})} numbers; one width was wanted"
            )
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
        self._pieces, self._waiting = [], 0
