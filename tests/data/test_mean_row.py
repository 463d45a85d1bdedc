"""The mean of a cache's rows is exact, computed once, and never that of other rows."""

import warnings

import numpy as np
import pytest

from siglit.cache import EmbeddingCache
from siglit.data import mean_row as module
from siglit.data.mean_row import mean_row


@pytest.fixture
def cache(cached):
    return EmbeddingCache(f"{cached.cache_folder}/train")


def test_equals_numpys_over_blocks_and_is_read_from_its_file(cache, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 5)
    expected = cache.gather(np.arange(len(cache))).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(mean_row(cache), expected, rtol=1e-6)
    monkeypatch.setattr(EmbeddingCache, "gather", None)
    np.testing.assert_allclose(mean_row(cache), expected, rtol=1e-6)


def test_a_damaged_file_is_computed_again(cache, caplog):
    expected = mean_row(cache)
    (path,) = cache.path.glob("mean-*.npy")
    damaged = bytearray(path.read_bytes())
    damaged[-80] ^= 1
    path.write_bytes(damaged)
    np.testing.assert_array_equal(mean_row(cache), expected)
    assert "is damaged" in caplog.text


def test_a_folder_that_cannot_be_written_is_no_error(cache, monkeypatch):
    def refuse(path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(module, "atomic_write", refuse)
    with pytest.warns(UserWarning, match="it is computed again each time"):
        first = mean_row(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(mean_row(cache), first)
