"""A shard that changes while it is mapped: named, and not confused with one that was replaced or only touched."""

import os
import re
import signal

import numpy as np
import pytest

from siglit.cache import CacheError, EmbeddingCache, finish, reader, write_shard

ROWS = 600


@pytest.fixture
def cache(tmp_path):
    """Two shards of three pages of embeddings each, in use."""
    rng = np.random.default_rng(0)
    for number in range(2):
        keys = [f"{number}-{row}" for row in range(ROWS)]
        rows = rng.standard_normal((ROWS, 10), np.float32)
        write_shard(tmp_path, number, embeddings=rows, keys=keys, captions=[["a"]] * ROWS, fingerprint={})
    finish(tmp_path, 2, {})
    cache = EmbeddingCache(tmp_path)
    cache.gather(np.arange(len(cache)))
    return cache


def test_a_shard_that_is_cut_off_is_named_by_the_process_that_it_kills(cache):
    """The kernel ends a process that reads beyond the end; without a handler, nothing would be said."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(sink, 2)
        os.truncate(cache.shard_paths[1], 4096)
        cache.gather(np.arange(len(cache)))
        os._exit(9)
    os.close(sink)
    with os.fdopen(source) as pipe:
        text = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert re.fullmatch(
        r"siglit: .*shard-000001\.h5 was cut off from \d+ to 4096 bytes while it was in use; delete this shard .*\n",
        text,
    )


def test_a_shard_that_is_overwritten_in_place_is_named(cache):
    cache.check_unchanged()
    path = cache.shard_paths[0]
    whole = path.read_bytes()
    path.write_bytes(cache.shard_paths[1].read_bytes())
    with pytest.raises(CacheError, match=r"shard-000000\.h5 was written to while it was in use: checksum is"):
        cache.check_unchanged()
    path.write_bytes(whole)
    cache.check_unchanged()


def test_a_bit_that_is_flipped_in_use_is_named(cache):
    path = cache.shard_paths[1]
    content = bytearray(path.read_bytes())
    content[content.find(cache.gather(np.array([ROWS])).tobytes())] ^= 4
    path.write_bytes(content)
    with pytest.raises(CacheError, match=r"shard-000001\.h5 was written to while it was in use: its data is damaged"):
        cache.check_unchanged()


def test_a_shard_that_is_replaced_deleted_or_touched_does_no_harm(cache):
    """A map shows the file that was mapped, also where its name is another's."""
    before = cache.gather(np.arange(len(cache)))
    first, second = cache.shard_paths
    os.utime(first)
    os.replace(second, first)
    cache.check_unchanged()
    first.unlink()
    cache.check_unchanged()
    assert np.array_equal(cache.gather(np.arange(len(cache))), before)


def test_a_touched_shard_is_read_again_once(cache, monkeypatch):
    """Not at each checkpoint of the rest of a run."""
    read = []
    real = reader.shard_problems
    monkeypatch.setattr(reader, "shard_problems", lambda path, *rest: (read.append(path.name), real(path, *rest))[1])
    os.utime(cache.shard_paths[0])
    cache.check_unchanged()
    cache.check_unchanged()
    assert read == ["shard-000000.h5"]


def test_a_bus_error_that_no_shard_explains_ends_the_process_as_ever(cache):
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGBUS)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGBUS
