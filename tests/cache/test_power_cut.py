"""The machine stops at any moment: unsynced data is lost, and the next run still ends with the right cache.

A file system may lose the content of a file until the file is fsynced, and a rename until its folder is.
"""

import os

import numpy as np
import pytest

from siglit.cache import EmbeddingCache, committed_shards, finish, remove_unfinished, write_shard

SHARDS = 3


class PowerCut(BaseException):
    pass


class Disk:
    """Replaces fsync and rename, stops at the `moment`-th sync or rename, and drops what was not synced by then."""

    def __init__(self, monkeypatch, moment):
        self._fsync, self._replace = os.fsync, os.replace
        self._left, self._synced, self._renamed = moment, set(), {}
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", self.replace)

    def _tick(self):
        if self._left == 0:
            raise PowerCut
        self._left -= 1

    def fsync(self, descriptor):
        self._tick()
        self._fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self._synced.add(os.fstat(descriptor).st_ino)
        self._renamed = {new: there for new, there in self._renamed.items() if os.path.dirname(new) != path}

    def replace(self, old, new):
        self._tick()
        self._replace(old, new)
        self._renamed[str(new)] = str(old)

    def lose(self, folder):
        """What the disk holds after the machine has started again, at worst."""
        for new in self._renamed:
            os.unlink(new)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.stat().st_ino not in self._synced:
                os.truncate(path, path.stat().st_size // 2)


def fill(folder, returned=None):
    remove_unfinished(folder)
    for number in sorted(set(range(SHARDS)) - committed_shards(folder, {"by": "me"})):
        rows = np.random.default_rng(number).standard_normal((4, 8))
        keys = [f"{number}-{row}" for row in range(4)]
        write_shard(
            folder, number, embeddings=rows, keys=keys, captions=[[key] for key in keys], fingerprint={"by": "me"}
        )
        if returned is not None:
            returned.add(number)
    finish(folder, SHARDS, {"by": "me"})


# A shard or an index: fsync, rename, fsync of the folder; the first one also the folder's own parent.
@pytest.mark.parametrize("moment", range(1 + 3 * (SHARDS + 1)))
def test_a_power_cut_at_any_moment(tmp_path, monkeypatch, moment):
    fill(tmp_path / "whole")
    returned = set()
    with monkeypatch.context() as patch:
        disk = Disk(patch, moment)
        with pytest.raises(PowerCut):
            fill(tmp_path / "cut", returned)
    disk.lose(tmp_path / "cut")
    assert committed_shards(tmp_path / "cut", {"by": "me"}) >= returned
    (tmp_path / "cut").mkdir(exist_ok=True)
    fill(tmp_path / "cut")
    assert EmbeddingCache(tmp_path / "cut").verify() == []
    there = {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()}
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def test_no_moment_is_left_out(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Disk(patch, 1 + 3 * (SHARDS + 1))
        fill(tmp_path / "whole")
