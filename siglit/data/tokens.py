"""Token ids of every caption of a cache, kept beside the embeddings and mapped, never tokenized twice.

Knows caches and the tokenizer's interface, not towers. The file is named after the tokenizer's fingerprint and the
cache's digest, so that a change of either makes another file. Shapes: M captions, L tokens.
"""

import itertools
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np

from siglit.cache import EmbeddingCache
from siglit.data.saved_array import load_saved
from siglit.models.tokenizer import Tokenizer
from siglit.runtime.files import append_checksum, atomic_write, remove_leftovers
from siglit.runtime.progress import Meter

_BLOCK = 65_536


def token_ids(cache: EmbeddingCache, tokenizer: Tokenizer) -> np.ndarray:
    """Return the (M, L) token ids of all captions in the cache's order, uint16 or int32, from the file or computed now.

    The file ends with a checksum, for which it is read once: a changed id would be trained on like any other. Where the
    cache's folder cannot be written, the ids are computed in memory, with a warning.
    """
    path = Path(cache.path) / f"tokens-{tokenizer.fingerprint}-{cache.digest[:16]}.npy"
    dtype: type = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    shape = (cache.num_captions, tokenizer.length)
    if shape[0] == 0:
        return np.empty(shape, dtype)
    saved = load_saved(path, shape, dtype)
    if saved is not None:
        return saved
    # Of every tokenizer: the file of another one may never be opened again.
    remove_leftovers(path.parent, "tokens-*.npy")
    try:
        with atomic_write(path) as file:
            ids = _map_of(file, dtype, shape)
            _fill(ids, cache, tokenizer)
            ids.flush()
            append_checksum(file)
    except OSError as error:
        warnings.warn(
            f"cannot write token ids into {cache.path} ({error.strerror}); they are computed again each time",
            stacklevel=2,
        )
        return _fill(np.empty(shape, dtype), cache, tokenizer)
    return np.load(path, mmap_mode="r")


def _map_of(file: BinaryIO, dtype: type, shape: tuple[int, int]) -> np.memmap:
    ids = np.lib.format.open_memmap(file.name, "w+", dtype=dtype, shape=shape)
    # The file is sparse so far, and writing one through a map kills the process (SIGBUS) when the disk is full.
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return ids


def _fill(ids: np.ndarray, cache: EmbeddingCache, tokenizer: Tokenizer) -> np.ndarray:
    captions = cache.iter_captions()
    with Meter("tokenizing", len(ids), "captions", quiet=len(ids) <= _BLOCK) as meter:
        for start in range(0, len(ids), _BLOCK):
            block = list(itertools.islice(captions, _BLOCK))
            ids[start : start + len(block)] = tokenizer(block)
            meter.advance(len(block))
    return ids
