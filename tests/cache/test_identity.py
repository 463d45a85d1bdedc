"""A shard is the one in the index, down to its last byte; indices of earlier versions stay readable."""

import json
import mmap

import numpy as np
import pytest

from siglit.cache import CacheError, EmbeddingCache, committed_shards, concat, finish, merge, write_shard
from siglit.cache.format import outside_datasets

FINGERPRINT = {"image_tower": {"model": "vit_b"}, "source": "x" * 200}


def make(folder, seed=0, shards=3, versions=None, prefix=""):
    rng = np.random.default_rng(seed)
    for number in range(shards):
        write_shard(
            folder,
            number,
            embeddings=rng.standard_normal((4, 6), np.float32),
            keys=[f"{prefix}{number}-{row}" for row in range(4)],
            captions=[["a", "bc"]] * 4,
            skipped=[("s", "why")],
            fingerprint=FINGERPRINT,
            versions=versions,
        )
    finish(folder, shards, FINGERPRINT)
    return EmbeddingCache(folder)


def without_new_fields(folder):
    """Rewrite the index as earlier versions did."""
    index = json.loads((folder / "index.json").read_text())
    del index["metadata_checksums"], index["created_by"]
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("old", [False, True])
def test_a_foreign_shard_of_equal_size_is_refused_when_it_is_first_needed(tmp_path, old):
    here, other = make(tmp_path / "here"), make(tmp_path / "other", seed=1)
    if old:
        without_new_fields(tmp_path / "here")
    foreign = other.shard_paths[1].read_bytes()
    assert len(foreign) == here.shard_paths[1].stat().st_size
    here.shard_paths[1].write_bytes(foreign)
    for read in (
        lambda cache: cache.gather(np.array([5])),
        lambda cache: cache.key(5),
        lambda cache: cache.caption_offsets,
        lambda cache: cache.skipped,
    ):
        cache = EmbeddingCache(tmp_path / "here")
        assert cache.key(0) == "0-0"
        for _ in range(2):
            with pytest.raises(CacheError, match=r"shard-000001\.h5 is not the shard that index\.json names"):
                read(cache)


def test_shards_that_changed_places_are_refused(tmp_path):
    first, second, _ = make(tmp_path).shard_paths
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    with pytest.raises(CacheError, match="shard-000000"):
        EmbeddingCache(tmp_path).key(0)


def test_a_shards_identity_is_checked_once_and_near_its_beginning(tmp_path, monkeypatch):
    """It reads three pages; opening the cache reads none."""
    make(tmp_path)
    offsets = []

    class Traced(mmap.mmap):
        def find(self, *arguments):
            offsets.append(super().find(*arguments))
            return offsets[-1]

    monkeypatch.setattr("siglit.cache.shard_maps.mmap.mmap", Traced)
    cache = EmbeddingCache(tmp_path)
    assert offsets == []
    for _ in range(3):
        cache.gather(np.arange(12))
        cache.captions(11)
    assert len(offsets) == 3
    assert all(0 < place < 3 * 4096 - 64 for place in offsets)


def test_a_shard_that_has_its_attributes_elsewhere_is_read_too(tmp_path):
    """Another writer may put the attributes behind the datasets."""
    path = make(tmp_path).shard_paths[1]
    index = json.loads((tmp_path / "index.json").read_text())
    carried = index["shards"][1]["checksum"].encode()
    path.write_bytes(path.read_bytes().replace(carried, b"0" * 64) + carried)
    index["shards"][1]["size"] += 64
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert EmbeddingCache(tmp_path).key(5) == "1-1"


def test_verify_detects_a_flipped_bit_in_any_byte(tmp_path):
    """The embedding and all bytes outside of the datasets: metadata, attributes, and the padding that HDF5 ignores."""
    cache = make(tmp_path, shards=1)
    path, record = cache.shard_paths[0], cache.located_shards()[0]
    whole = path.read_bytes()
    gaps = outside_datasets(record)
    assert sum(end - start for start, end in gaps) > 0.9 * len(whole)
    rng = np.random.default_rng(0)
    places = [int(rng.integers(start, end)) for start, end in gaps if start < end]
    places += [0, len(whole) - 1, record.datasets["embedding"][0] + 1]
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        problems = EmbeddingCache(tmp_path).verify()
        assert problems, place
        assert all("shard-000000.h5" in text for text in problems)
    path.write_bytes(whole)
    assert EmbeddingCache(tmp_path).verify() == []


def test_an_index_of_an_earlier_version_is_read_and_completed(tmp_path):
    new = make(tmp_path).shard_paths
    whole = (tmp_path / "index.json").read_bytes()
    without_new_fields(tmp_path)
    cache = EmbeddingCache(tmp_path)
    assert (cache.verify(), cache.created_by, cache.key(11)) == ([], [], "2-3")
    assert committed_shards(tmp_path, FINGERPRINT) == {0, 1, 2}
    finish(tmp_path, 3, FINGERPRINT)
    assert (tmp_path / "index.json").read_bytes() == whole
    assert EmbeddingCache(tmp_path).digest == cache.digest
    assert new == cache.shard_paths


def test_an_index_whose_lists_differ_in_length_is_refused(tmp_path):
    make(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["metadata_checksums"].pop()
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(CacheError, match="damaged"):
        EmbeddingCache(tmp_path)


def test_versions_are_kept_and_never_compared(tmp_path):
    parts = [
        make(tmp_path / "a", versions={"torch": "2.1", "timm": "1.0"}, prefix="a"),
        make(tmp_path / "b", seed=1, versions={"torch": "2.2"}, prefix="b"),
    ]
    assert [text.split(", ")[2:] for part in parts for text in part.created_by] == [
        ["torch 2.1", "timm 1.0"],
        ["torch 2.2"],
    ]
    both = sorted(parts[0].created_by + parts[1].created_by)
    assert merge(tmp_path / "out", parts).created_by == both == concat(parts).created_by
    assert EmbeddingCache(tmp_path / "out").verify() == []


def test_completing_a_cache_again_does_not_approve_a_flipped_bit(tmp_path):
    """`verify` would then no longer detect it."""
    cache = make(tmp_path)
    path = cache.shard_paths[0]
    content = bytearray(path.read_bytes())
    start, end = max(outside_datasets(cache.located_shards()[0]), key=lambda gap: gap[1] - gap[0])
    content[(start + end) // 2] ^= 1
    path.write_bytes(content)
    before = (tmp_path / "index.json").read_bytes()
    with pytest.raises(CacheError, match=r"shard-000000.h5: bytes outside its datasets.*verify --repair"):
        finish(tmp_path, 3, FINGERPRINT)
    assert (tmp_path / "index.json").read_bytes() == before
