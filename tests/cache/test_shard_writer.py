"""The writer: a shard is committed whole or not at all; a cache is complete, or the message says what is missing."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest

from siglit.cache import CacheError, EmbeddingCache, committed_shards, finish, remove_unfinished, write_shard

FINGERPRINT = {"image_tower": {"model": "vit_b"}, "size": 224}
ROOT = Path(__file__).parents[2]


def write(folder: Path, number: int, rows: int = 3, **changes) -> Path:
    arguments = {
        "embeddings": np.full((rows, 8), number, np.float32),
        "keys": [f"{number}-{row}" for row in range(rows)],
        "captions": [["one", "two"]] * rows,
        "fingerprint": FINGERPRINT,
    }
    return write_shard(folder, number, **{**arguments, **changes})


def test_a_killed_writer_loses_nothing_that_was_committed(tmp_path):
    """SIGKILL at random moments: every committed shard is whole, and the next writer resumes."""
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        import numpy as np
        from siglit.cache import committed_shards, write_shard
        folder = Path(sys.argv[1])
        for number in sorted(set(range(100_000)) - committed_shards(folder, {"by": "me"})):
            rng = np.random.default_rng(number)
            write_shard(folder, number, embeddings=rng.standard_normal((1500, 64), np.float32),
                        keys=[f"{number}-{row}" for row in range(1500)], captions=[["a", "b"]] * 1500,
                        fingerprint={"by": "me"})
    """)
    rng = np.random.default_rng()
    counts = [0]
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=ROOT) as process:
            while len(list(tmp_path.glob("*.h5"))) == counts[-1]:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
        committed = committed_shards(tmp_path, {"by": "me"})
        counts.append(len(committed))
        assert committed == set(range(len(committed)))
        remove_unfinished(tmp_path)
        assert not list(tmp_path.glob("*.tmp*"))
    assert all(before < after for before, after in pairwise(counts)), "a restart lost shards"
    with pytest.raises(CacheError, match="is not complete"):
        EmbeddingCache(tmp_path)
    finish(tmp_path, counts[-1], {"by": "me"})
    cache = EmbeddingCache(tmp_path)
    assert len(cache) == 1500 * counts[-1]
    assert cache.verify() == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "text"), [(errno.ENOSPC, "is full"), (errno.EDQUOT, "quota"), (errno.EIO, "Input/output")]
)
def test_a_failed_write_leaves_nothing_and_says_why(tmp_path, monkeypatch, call, code, text):
    write(tmp_path, 0)

    def fail(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match=text) as caught:
            write(tmp_path, 1)
    assert caught.value.errno == code
    assert "shard-000001.h5" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.h5"]
    write(tmp_path, 1)
    finish(tmp_path, 2, FINGERPRINT)
    assert EmbeddingCache(tmp_path).verify() == []


def test_a_file_that_stops_growing_leaves_nothing(tmp_path):
    """A real write that fails half-way (RLIMIT_FSIZE), not a simulated one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="ulimit -f"):
            write(tmp_path, 0, rows=50_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_index_leaves_the_shards(tmp_path, monkeypatch):
    write(tmp_path, 0)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=r"index\.json .* is full"):
            finish(tmp_path, 1, FINGERPRINT)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.h5"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="could not be written into"):
            write(tmp_path, 0)
    finally:
        tmp_path.chmod(0o700)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(FileExistsError, match="could not be written into"):
        write(tmp_path / "cache", 0)


def test_the_commit_is_durable_in_the_right_order(tmp_path, monkeypatch):
    """The file is fsynced before it gets its name, the folder afterwards."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(descriptor):
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append("folder" if target.is_dir() else f"file of {target.stat().st_size}")
        fsync(descriptor)

    def traced_replace(source, target):
        assert ".tmp" in Path(source).name
        calls.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    path = write(tmp_path, 0)
    assert calls == [f"file of {path.stat().st_size}", "name", "folder"]


def test_unfinished_files_are_ignored_and_removed(tmp_path):
    path = write(tmp_path, 0)
    for name in ("shard-000001.h5.tmp.77-ab", "index.json.tmp.77-cd"):
        (tmp_path / name).write_bytes(path.read_bytes()[:5000])
    assert committed_shards(tmp_path, FINGERPRINT) == {0}
    finish(tmp_path, 1, FINGERPRINT)
    assert EmbeddingCache(tmp_path).verify() == []
    assert remove_unfinished(tmp_path) == 2
    assert remove_unfinished(tmp_path) == 0
    assert remove_unfinished(tmp_path / "absent") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "shard-000000.h5"]


def test_same_input_gives_same_bytes(tmp_path, monkeypatch):
    write(tmp_path / "a", 0, langs=[["en", "de"]] * 3, labels=[1, None, 2], skipped=[("x", "y")])
    finish(tmp_path / "a", 1, FINGERPRINT)
    # HDF5's times have a resolution of a second.
    time.sleep(1.1)
    write(tmp_path / "b", 0, langs=[["en", "de"]] * 3, labels=[1, None, 2], skipped=[("x", "y")])
    finish(tmp_path / "b", 1, dict(reversed(FINGERPRINT.items())))
    for name in ("shard-000000.h5", "index.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_finish_twice_changes_nothing(tmp_path):
    write(tmp_path, 0)
    finish(tmp_path, 1, FINGERPRINT)
    before = (tmp_path / "index.json").stat()
    finish(tmp_path, 1, FINGERPRINT)
    after = (tmp_path / "index.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_shard_is_never_replaced(tmp_path):
    before = write(tmp_path, 0).read_bytes()
    with pytest.raises(CacheError, match="already committed"):
        write(tmp_path, 0, embeddings=np.ones((3, 8)))
    assert (tmp_path / "shard-000000.h5").read_bytes() == before


def test_a_cache_that_gets_a_shard_again_is_not_complete(tmp_path):
    """A shard that was deleted as damaged comes back: until `finish`, the old index must not be used for it."""
    for number in range(2):
        write(tmp_path, number)
    finish(tmp_path, 2, FINGERPRINT)
    (tmp_path / "shard-000001.h5").unlink()
    write(tmp_path, 1, embeddings=np.ones((3, 8)))
    with pytest.raises(CacheError, match="not complete: it has 2 shards"):
        EmbeddingCache(tmp_path)
    finish(tmp_path, 2, FINGERPRINT)
    assert EmbeddingCache(tmp_path).verify() == []


@pytest.mark.parametrize("step", ["resume", "finish"])
def test_another_fingerprint_is_refused_by_field(tmp_path, step):
    write(tmp_path, 0)
    other = {"image_tower": {"model": "vit_l"}, "size": 224}
    with pytest.raises(CacheError, match=r"image_tower\.model is 'vit_b', expected 'vit_l'") as caught:
        committed_shards(tmp_path, other) if step == "resume" else finish(tmp_path, 1, other)
    assert "size" not in str(caught.value)
    assert "shard-000000.h5" in str(caught.value)


def test_a_large_fingerprint_fits(tmp_path):
    large = {"files": [f"train-{number:05d}.tar" for number in range(10_000)]}
    write(tmp_path, 0, fingerprint=large)
    assert committed_shards(tmp_path, large) == {0}


def test_no_folder_has_no_shards(tmp_path):
    assert committed_shards(tmp_path / "absent", FINGERPRINT) == set()


def test_missing_and_superfluous_shards_are_named(tmp_path):
    for number in (0, 2):
        write(tmp_path, number)
    with pytest.raises(CacheError, match=r"1 of 3 shards missing, the first is shard-000001\.h5"):
        finish(tmp_path, 3, FINGERPRINT)
    write(tmp_path, 1)
    with pytest.raises(CacheError, match=r"3 shards, but its source needs 2 .*shard-000002\.h5"):
        finish(tmp_path, 2, FINGERPRINT)
    assert not (tmp_path / "index.json").exists()


def test_a_key_in_two_shards_is_named_with_both_places(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1, rows=0)
    write(tmp_path, 2, keys=["a", "b", "0-1"])
    with pytest.raises(CacheError, match=r"'0-1' is in row 1 of shard-000000\.h5 and in row 2 of shard-000002\.h5"):
        finish(tmp_path, 3, FINGERPRINT)


def test_shards_of_different_width_are_named(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1, embeddings=np.ones((3, 9)))
    with pytest.raises(CacheError, match=r"width 8 in shard-000000\.h5, 9 in shard-000001\.h5"):
        finish(tmp_path, 2, FINGERPRINT)


def test_a_cut_shard_is_named(tmp_path):
    path = write(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(CacheError, match=r"shard-000000\.h5 cannot be read as HDF5 .* delete it"):
        committed_shards(tmp_path, FINGERPRINT)


def test_a_foreign_hdf5_file_is_named(tmp_path):
    with h5py.File(tmp_path / "shard-000000.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(CacheError, match="is not a shard of a cache"):
        committed_shards(tmp_path, FINGERPRINT)


def test_a_newer_shard_is_refused(tmp_path):
    path = write(tmp_path, 0)
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 2
    with pytest.raises(CacheError, match=r"version 2; .*update siglit"):
        committed_shards(tmp_path, FINGERPRINT)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"embeddings": np.array([[1.0], [1e5], [0]])}, r"'0-1' \(row 1\) holds 100000.0; expected finite values"),
        ({"embeddings": np.array([[1.0], [0], [np.nan]], np.float32)}, r"'0-2' \(row 2\) holds nan"),
        ({"embeddings": np.ones((2, 8))}, r"expected floats \(3, D\)"),
        ({"embeddings": np.ones((3, 8), np.int64)}, "floats"),
        ({"embeddings": np.ones((3, 0))}, "rows have no values"),
        ({"keys": ["a", "b", "a"]}, "'a' is in row 0 and in row 2"),
        ({"captions": [["x"]] * 2}, "3 keys need as many lists of captions"),
        ({"captions": ["one", "two", "six"]}, "list of captions"),
        ({"langs": [["en"]] * 3}, "one language per caption"),
        ({"labels": [1, 2]}, "2 labels for 3 rows"),
        ({"labels": [1, None, -7]}, "a label is -7"),
        ({"fingerprint": {"path": Path("x")}}, "JSON"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, changes, text):
    with pytest.raises(CacheError, match=text):
        write(tmp_path / "cache", 0, **changes)
    assert not (tmp_path / "cache").exists()


def test_index_has_counts_of_every_shard(tmp_path):
    write(tmp_path, 0, labels=[None, 1, None], langs=[["en", ""]] * 3)
    write(tmp_path, 1, rows=0, skipped=[("a", "x"), ("b", "y")])
    finish(tmp_path, 2, FINGERPRINT)
    index = json.loads((tmp_path / "index.json").read_text())
    assert [index[name] for name in ("version", "dim", "rows", "captions", "skipped")] == [1, 8, 3, 6, 2]
    counts = ("rows", "captions", "skipped", "labelled", "with_lang")
    assert [[shard[name] for name in counts] for shard in index["shards"]] == [[3, 6, 0, 1, 3], [0, 0, 2, 0, 0]]
