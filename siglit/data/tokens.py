"""Token ids of every caption of a cache, kept beside the embeddings and mapped, never tokenised twice.

Knows caches and the tokenizer's interface, not towers. The file is named after the tokenizer's fingerprint and the
cache's digest, so that a change of either makes another file. Shapes: M captions, L tokens.
"""

import itertools
import os
import warnings
from pathlib import Path

import numpy as np

from siglit.cache import EmbeddingCache
from siglit.models.tokenizer import Tokenizer
from siglit.progress import Meter

_BLOCK = 65_536


def token_ids(cache: EmbeddingCache, tokenizer: Tokenizer) -> np.ndarray:
    """Return the (M, L) token ids of all captions in the cache's order, uint16 or int32, from the file or made now.

    Where the cache's folder cannot be written, the ids are made anew in memory, with a warning.
    """
    path = Path(cache.path) / f"tokens-{tokenizer.fingerprint}-{cache.digest[:16]}.npy"
    if path.exists():
        try:
            return np.load(path, mmap_mode="r")
        except ValueError:
            path.unlink()  # cut short by a full disk or a crash: made anew
    dtype: type = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    shape = (cache.num_captions, tokenizer.length)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        ids = _new_file(unfinished, dtype, shape) if shape[0] else np.empty(shape, dtype)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        warnings.warn(
            f"cannot keep token ids in {cache.path} ({error.strerror}); they are made anew each time", stacklevel=2
        )
        return _fill(np.empty(shape, dtype), cache, tokenizer)
    try:
        _fill(ids, cache, tokenizer)
        if isinstance(ids, np.memmap):
            ids.flush()
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r") if path.exists() else ids


def _new_file(path: Path, dtype: type, shape: tuple[int, int]) -> np.memmap:
    ids = np.lib.format.open_memmap(path, "w+", dtype=dtype, shape=shape)
    # The file is sparse so far, and writing one through a map kills the process (SIGBUS) when the disk is full.
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return ids


def _fill(ids: np.ndarray, cache: EmbeddingCache, tokenizer: Tokenizer) -> np.ndarray:
    captions = cache.iter_captions()
    with Meter("tokenising", len(ids), "captions", quiet=len(ids) <= _BLOCK) as meter:
        for start in range(0, len(ids), _BLOCK):
            block = list(itertools.islice(captions, _BLOCK))
            ids[start : start + len(block)] = tokenizer(block)
            meter.advance(len(block))
    return ids
