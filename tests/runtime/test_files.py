"""Files that are written whole or not at all: side by side, through kills, and without harm to what others write."""

import fcntl
import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from siglit.cache import EmbeddingCache, finish, remove_unfinished, write_shard
from siglit.data.tokens import token_ids
from siglit.runs.checkpoints import prepare
from siglit.runs.folder import write_json
from siglit.runtime.files import atomic_write, file_hash, remove_leftovers
from siglit.training.checkpointing import AtomicCheckpointIO
from siglit.training.metrics_csv import MetricsTable
from tests.data.test_tokens import WordLengths, make_cache

# What earlier versions called the temporary files of summary.json, last.ckpt, a shard and an export.
EARLIER = {
    "summary.json": "summary.4711.tmp",
    "last.ckpt": "last.tmp",
    "shard-000001.h5": "shard-000001.h5.tmp.4711-0a1b2c3d",
    "img_emb_0000.npy": "img_emb_0000.npy.tmp",
}


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def killed_while_writing(path):
    """Start to write in a process that is killed; return the name of its temporary file."""
    before = set(names(path.parent))
    child = os.fork()
    if child == 0:
        with atomic_write(path) as file:
            file.write(b"half")
            file.flush()
            os._exit(9)
    os.waitpid(child, 0)
    (left,) = set(names(path.parent)) - before
    return left


@pytest.fixture
def same_process_id(monkeypatch):
    """As in two containers."""
    monkeypatch.setattr(os, "getpid", lambda: 7)


def test_two_writers_with_one_process_id_do_not_meet(tmp_path, same_process_id):
    """Neither takes the other's file for its own or for a leftover; the last one to end decides the content."""
    path = tmp_path / "summary.json"
    with atomic_write(path) as first:
        first.write(b"first")
        with atomic_write(path) as second:
            second.write(b"second")
            assert len(names(tmp_path)) == 2
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["summary.json"]


@pytest.mark.parametrize("what", ["tokens", "json", "checkpoint", "metrics"])
def test_writers_of_one_name_at_the_same_time(tmp_path, same_process_id, monkeypatch, what):
    """Both are in the middle of their file when they meet; each ends, and one of them has it whole."""
    cache = make_cache(tmp_path / "cache", [["one two", "three"], ["four"]])
    gate = threading.Barrier(2, timeout=10)
    replace = os.replace

    def meet_and_replace(source, target):
        if ".tmp" in str(source):
            gate.wait()
        replace(source, target)

    monkeypatch.setattr(os, "replace", meet_and_replace)
    failed = []

    def write():
        try:
            if what == "tokens":
                assert token_ids(cache, WordLengths()).tolist()[0] == [3, 3, 1, 1, 1]
            elif what == "json":
                write_json(tmp_path / "summary.json", {"a": 1})
            elif what == "checkpoint":
                AtomicCheckpointIO().save_checkpoint({"global_step": 1}, tmp_path / "last.ckpt")
            else:
                table = MetricsTable(tmp_path / "metrics.csv")
                table.log_metrics({"loss": 1.0}, 0)
                table.save()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert not list(tmp_path.rglob("*.tmp*"))


def test_a_failed_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "summary.json"
    path.write_bytes(b"before")

    def fail():
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (path.read_bytes(), names(tmp_path)) == (b"before", ["summary.json"])


def test_a_kill_leaves_a_temporary_file_and_the_next_run_cleans_it(tmp_path):
    path = tmp_path / "summary.json"
    path.write_bytes(b"before")
    assert killed_while_writing(path).startswith("summary.json.tmp-")
    assert path.read_bytes() == b"before"
    with atomic_write(path) as file:
        file.write(b"after")
    assert (path.read_bytes(), names(tmp_path)) == (b"after", ["summary.json"])


@pytest.mark.parametrize("name", EARLIER)
def test_what_earlier_versions_left_is_cleaned_too(tmp_path, name):
    """In folders that only siglit writes: those of shards, token ids and checkpoints."""
    others = [other for kind, other in EARLIER.items() if kind != name]
    for left in EARLIER.values():
        (tmp_path / left).write_bytes(b"half")
    remove_leftovers(tmp_path, name)
    assert names(tmp_path) == sorted(others)


def test_a_similar_name_is_no_leftover(tmp_path):
    alike = ["summary-2.json.tmp-00", "summary.json.tmpl", "a.summary.json.tmp-00", "summary.old.tmp", "summary.txt"]
    for name in alike:
        (tmp_path / name).touch()
    write_json(tmp_path / "summary.json", {})
    assert names(tmp_path) == sorted([*alike, "summary.json"])


def test_without_locks_no_file_is_taken_for_a_leftover(tmp_path, monkeypatch):
    """A live writer's file could not be distinguished from it."""
    left = killed_while_writing(tmp_path / "summary.json")

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_json(tmp_path / "summary.json", {})
    assert names(tmp_path) == ["summary.json", left]


def test_a_temporary_file_deleted_before_it_is_locked_is_created_again(tmp_path, monkeypatch):
    """Another process may take it for a leftover before its writer has locked it."""
    lock, taken = fcntl.flock, []

    def clean_first(file, how):
        if not taken:
            taken.append(file.name)
            os.unlink(file.name)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", clean_first)
    write_json(tmp_path / "summary.json", {})
    assert len(taken) == 1
    assert names(tmp_path) == ["summary.json"]


class TestCache:
    def test_a_precompute_rerun_leaves_a_token_file_that_a_trainer_is_writing(self, tmp_path):
        """Only leftovers of shards and indexes are deleted."""
        cache = make_cache(tmp_path / "cache", [["one two", "three"], ["four"]])
        (cache.path / "shard-000007.h5.tmp-00").write_bytes(b"half")

        class Slow(WordLengths):
            def __call__(self, texts):
                assert remove_unfinished(cache.path) == 1
                write_shard(cache.path, 2, embeddings=np.ones((1, 3)), keys=["k"], captions=[["c"]], fingerprint={})
                finish(cache.path, 3, {})
                return super().__call__(texts)

        ids = token_ids(EmbeddingCache(cache.path), Slow())
        assert ids.tolist()[0] == [3, 3, 1, 1, 1]
        assert len([name for name in names(cache.path) if name.startswith("tokens-")]) == 1
        assert not list(cache.path.glob("*.tmp*"))

    def test_token_ids_of_a_killed_trainer_go_when_the_next_one_writes(self, tmp_path):
        """Also those of another tokenizer, whose file may never be written again; those of a live writer stay."""
        cache = make_cache(tmp_path / "cache", [["one two"], ["four"]])
        (cache.path / "tokens-other-cache.4711.tmp").write_bytes(b"half")
        left = killed_while_writing(cache.path / "tokens-a-b.npy")
        with atomic_write(cache.path / "tokens-c-d.npy") as live:
            token_ids(cache, WordLengths())
            assert [name for name in names(cache.path) if ".tmp" in name] == [Path(live.name).name]
        assert left not in names(cache.path)

    def test_training_leaves_a_shard_that_precompute_is_writing(self, tmp_path):
        cache = make_cache(tmp_path / "cache", [["one two"], ["four"]])
        with atomic_write(cache.path / "shard-000002.h5"):
            token_ids(cache, WordLengths())
        assert "shard-000002.h5" in names(cache.path)


def test_checkpoints_clean_up_their_own_only(tmp_path):
    """Of this version and of earlier ones."""
    for name in ("last.ckpt.tmp-00", "last.tmp", "other.ckpt.tmp-00"):
        (tmp_path / name).write_bytes(b"half")
    assert prepare(tmp_path) is None
    assert names(tmp_path) == ["other.ckpt.tmp-00"]


def test_a_folder_that_is_not_there_has_no_leftovers(tmp_path):
    remove_leftovers(tmp_path / "absent", "*")


def test_temporary_files_of_others_stay(tmp_path):
    """A results folder may hold a user's files; only names that `atomic_write` chooses are deleted."""
    left = f"summary.json.tmp-{'0' * 16}"
    mine = ["summary.tmp", "summary.2024.tmp", "summary.json.tmp-mine", "summary.json.tmp.bak"]
    for name in (*mine, left):
        (tmp_path / name).write_bytes(b"text")
    write_json(tmp_path / "summary.json", {})
    assert names(tmp_path) == sorted([*mine, "summary.json"])


def test_what_is_being_written_can_be_read(tmp_path):
    """As glibc does in place of fallocate, where the file system has none."""
    with atomic_write(tmp_path / "x") as file:
        file.write(b"text")
        file.flush()
        assert os.pread(file.fileno(), 4, 0) == b"text"


def test_hashes_of_a_file(tmp_path):
    """The defaults are in indices and fingerprints, so they may not change; a folder is refused."""
    (tmp_path / "x").write_bytes(b"text")
    assert file_hash(tmp_path / "x") == hashlib.blake2b(b"text", digest_size=16).hexdigest()
    assert file_hash(str(tmp_path / "x"), "sha256") == hashlib.sha256(b"text").hexdigest()
    with pytest.raises(OSError, match="it is a folder"):
        file_hash(tmp_path)
