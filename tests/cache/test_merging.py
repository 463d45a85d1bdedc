"""Several caches as one: the same rows in order, copied or read in place; parts that do not fit are refused."""

import numpy as np
import pytest

from siglit.cache import CacheError, CacheWriter, EmbeddingCache, concat, merge


def make(folder, start, count, shard_size=4, dim=3, **fingerprint):
    rng = np.random.default_rng(start)
    with CacheWriter(folder, {"tower": "a", "source": str(start), **fingerprint}, shard_size) as writer:
        writer.add(
            rng.standard_normal((count, dim)),
            [f"k{n}" for n in range(start, start + count)],
            [[f"c{n}", "ä"][: n % 3] for n in range(start, start + count)],
            labels=[None if n % 2 else n for n in range(start, start + count)],
        )
    return EmbeddingCache(folder)


def content(cache):
    rows = range(len(cache))
    return (
        cache.gather(np.arange(len(cache))).tobytes(),
        list(cache.keys),
        [cache.captions(row) for row in rows],
        None if cache.labels is None else cache.labels.tolist(),
        cache.caption_offsets.tolist(),
    )


@pytest.mark.parametrize("together", [merge, lambda out, parts: concat(parts)])
def test_parts_become_one_in_order(tmp_path, together):
    parts = [make(tmp_path / "a", 0, 10), make(tmp_path / "b", 10, 5), make(tmp_path / "c", 15, 1)]
    cache = together(tmp_path / "out", parts)
    whole = make(tmp_path / "whole", 0, 16)
    result = content(cache)
    assert result[0] == b"".join(content(part)[0] for part in parts)
    assert result[1:] == content(whole)[1:]
    assert cache.fingerprint == {"tower": "a", "source": {"merged": ["0", "10", "15"]}}
    assert cache.verify() == []
    np.testing.assert_array_equal(cache.gather(np.array([15, 0, 11]))[1:2], parts[0].gather(np.array([0])))


def test_merging_resumes_where_it_stopped(tmp_path):
    parts = [make(tmp_path / "a", 0, 10), make(tmp_path / "b", 10, 5)]
    merge(tmp_path / "whole", parts)
    merge(tmp_path / "out", parts)
    for name in ("index.json", "shard-000001.h5"):
        (tmp_path / "out" / name).unlink()
    merge(tmp_path / "out", parts)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_shards_keep_their_checksums(tmp_path):
    """The data is copied, so the checksums over it stay."""
    parts = [make(tmp_path / "a", 0, 4), make(tmp_path / "b", 4, 4)]
    merged = merge(tmp_path / "out", parts)
    checksums = [shard.checksum for part in parts for shard in part.located_shards()]
    assert [shard.checksum for shard in merged.located_shards()] == checksums


@pytest.mark.parametrize("together", [merge, lambda out, parts: concat(parts)])
def test_other_towers_and_widths_are_refused(tmp_path, together):
    first = make(tmp_path / "a", 0, 4)
    with pytest.raises(CacheError, match=r"tower is 'b', expected 'a'"):
        together(tmp_path / "out", [first, make(tmp_path / "b", 4, 4, tower="b")])
    with pytest.raises(CacheError, match="width 3 in .* 2 in"):
        together(tmp_path / "out", [first, make(tmp_path / "c", 4, 4, dim=2)])
    assert not (tmp_path / "out").exists()


def test_a_shared_key_is_refused_before_anything_is_written(tmp_path):
    parts = [make(tmp_path / "a", 0, 4), make(tmp_path / "b", 3, 4)]
    with pytest.raises(CacheError, match="key 'k3'"):
        merge(tmp_path / "out", parts)
    assert not (tmp_path / "out").exists()
    assert any("k3" in text for text in concat(parts).verify())


def test_a_damaged_part_is_not_merged(tmp_path):
    parts = [make(tmp_path / "a", 0, 4), make(tmp_path / "b", 4, 4)]
    path = tmp_path / "b" / "shard-000000.h5"
    data = bytearray(path.read_bytes())
    data[parts[1].located_shards()[0].datasets["embedding"][0]] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match="damaged"):
        merge(tmp_path / "out", parts)
    with pytest.raises(CacheError, match="not complete"):
        EmbeddingCache(tmp_path / "out")
