"""CacheWriter: pieces of any size become the same cache; an exception leaves none."""

from itertools import pairwise

import numpy as np
import pytest

from siglit.cache import CacheError, CacheWriter, EmbeddingCache

ROWS = np.random.default_rng(0).standard_normal((23, 4)).astype(np.float32)
KEYS = [f"k{n}" for n in range(23)]


@pytest.mark.parametrize("pieces", [[23], [1] * 23, [5, 0, 11, 7]])
def test_pieces_of_any_size_give_the_same_files(tmp_path, pieces):
    ends = np.cumsum([0, *pieces])
    with CacheWriter(tmp_path / "out", {"by": "me"}, shard_size=5) as writer:
        for a, b in pairwise(ends):
            writer.add(ROWS[a:b], KEYS[a:b], [[key] * 2 for key in KEYS[a:b]], langs=[["de", ""]] * (b - a))
    with CacheWriter(tmp_path / "whole", {"by": "me"}, shard_size=5) as writer:
        writer.add(ROWS, KEYS, [[key] * 2 for key in KEYS], langs=[["de", ""]] * 23)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["index.json", *(f"shard-{n:06d}.h5" for n in range(5))]
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    cache = EmbeddingCache(tmp_path / "out")
    assert (list(cache.keys), cache.captions(6), cache.langs[12:14].tolist()) == (KEYS, ["k6", "k6"], ["de", ""])
    assert cache.gather(np.arange(23)).tobytes() == ROWS.astype(np.float16).tobytes()


def fill(folder, *pieces, fails=False, **options):
    with CacheWriter(folder, {"by": "me"}, **options) as writer:
        for rows, keys in pieces:
            writer.add(rows, keys)
        if fails:
            raise ZeroDivisionError


def test_an_exception_leaves_no_complete_cache(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fill(tmp_path / "out", (ROWS, KEYS), shard_size=5, fails=True)
    with pytest.raises(CacheError, match="not complete"):
        EmbeddingCache(tmp_path / "out")
    with pytest.raises(CacheError, match="already holds shards"):
        fill(tmp_path / "out")


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([(ROWS, KEYS[:-1])], "the lengths differ"),
        ([(ROWS, KEYS), (ROWS[:, :3], [f"x{key}" for key in KEYS])], "one width"),
        ([], "no rows"),
        ([(ROWS, KEYS), (ROWS, KEYS)], "key 'k0'"),
        ([(ROWS * np.inf, KEYS)], "finite"),
    ],
)
def test_what_cannot_be_rows_is_refused(tmp_path, pieces, text):
    with pytest.raises(CacheError, match=text):
        fill(tmp_path / "a", *pieces)
    assert not (tmp_path / "a" / ".lock").exists()
