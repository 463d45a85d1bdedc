"""Keys are unique: a second shard with a key is refused, whichever process committed the first."""

import tracemalloc

import numpy as np
import pytest

from siglit.cache import CacheError, CacheWriter, KnownKeys, find_duplicate, hash_keys
from tests.cache.test_shard_writer import write


def test_the_second_shard_with_a_key_is_not_committed(tmp_path):
    with (
        pytest.raises(CacheError, match=r"'k2' is in row 2 of shard-000000\.h5 and in row 1 of shard-000002\.h5"),
        CacheWriter(tmp_path, {"by": "me"}, shard_size=3) as writer,
    ):
        writer.add(np.ones((9, 2)), ["k0", "k1", "k2", "k3", "k4", "k5", "k6", "k2", "k8"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.h5", "shard-000001.h5"]


def test_shards_of_other_processes_and_earlier_runs_are_compared_too(tmp_path):
    write(tmp_path, 0)
    known = KnownKeys(tmp_path)
    known.add(1, ["a", "b"])
    write(tmp_path, 1, keys=["a", "b", "c"])  # by this process: what it compared is not read again
    write(tmp_path, 5, rows=0)
    write(tmp_path, 7, keys=["x", "y", "z"])
    with pytest.raises(CacheError, match=r"'0-1' is in row 1 of shard-000000\.h5 and in row 0 of shard-000003\.h5"):
        known.add(3, ["0-1"])
    with pytest.raises(CacheError, match=r"'z' is in row 2 of shard-000007\.h5 and in row 1 of shard-000004\.h5"):
        known.add(4, ["u", "z"])
    known.add(6, [])
    known.add(8, ["c"])


def test_equal_hashes_of_different_keys_are_no_duplicate(tmp_path, monkeypatch):
    monkeypatch.setattr("siglit.cache.keys.hash_keys", lambda keys: np.zeros(len(keys), np.uint64))
    write(tmp_path, 0)
    known = KnownKeys(tmp_path)
    known.add(1, ["a", "b"])
    with pytest.raises(CacheError, match=r"'0-2'"):
        known.add(2, ["c", "0-2"])


def test_many_shards_stay_at_eight_bytes_per_key(tmp_path, monkeypatch):
    monkeypatch.setattr("siglit.cache.keys.shard_files", lambda folder: {})
    known = KnownKeys(tmp_path)
    rng = np.random.default_rng(0)
    monkeypatch.setattr("siglit.cache.keys.hash_keys", lambda keys: rng.integers(0, 2**63, len(keys), np.uint64))
    shard = ["k"] * 8192
    tracemalloc.start()
    for number in range(300):
        known.add(number, shard)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 8.1 * 300 * 8192
    assert peak < 16.5 * 300 * 8192
    assert sum(map(len, known._sorted_hashes)) == 300 * 8192
    assert len(known._sorted_hashes) < 10


def test_two_places_of_one_key_in_lists():
    parts = [["a", "b"], [], ["c"], ["d", "b"]]
    read_parts = []

    def keys_of(part):
        read_parts.append(part)
        return parts[part]

    duplicate = find_duplicate([hash_keys(part) for part in parts], keys_of)
    assert duplicate == ("b", (0, 1), (3, 1))
    assert read_parts == [0, 3]
    assert find_duplicate([hash_keys(part) for part in parts[:3]], keys_of) is None
    assert find_duplicate([], keys_of) is None


@pytest.mark.parametrize("key", [1, "\udc80"])
def test_a_key_that_is_no_text_is_named(tmp_path, key):
    with pytest.raises(CacheError, match="key 1 is .*expected text that UTF-8 can encode"):
        hash_keys(["a", key])
