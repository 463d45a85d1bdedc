"""The lock: one writer at a time, whom the second one's message names; it ends with its holder."""

import os
import signal
import subprocess
import sys

import pytest

from siglit.cache import CacheError, exclusive
from tests.conftest import ROOT

HOLD = """
import os, sys, time
from siglit.cache import exclusive
with exclusive(sys.argv[1]):
    if sys.argv[2] == "fork":
        os.fork()
    print(f"{os.getpid()}\\n", end="", flush=True)  # one write, or two processes' lines may mix
    time.sleep(60)
"""


def hold(folder, how):
    return subprocess.Popen([sys.executable, "-c", HOLD, folder, how], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_second_writer_is_refused_with_the_first_ones_name(tmp_path):
    with (
        exclusive(tmp_path),
        pytest.raises(CacheError, match=rf"host \S+, process {os.getpid()}, since \d{{4}}-"),
        exclusive(tmp_path),
    ):
        pass
    with exclusive(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_releases_the_lock(tmp_path):
    with hold(tmp_path, "alone") as holder:
        assert holder.stdout.readline()
        with pytest.raises(CacheError, match=f"process {holder.pid}"), exclusive(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with exclusive(tmp_path):
            pass


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    """A worker that outlives its killed parent must not block the next run."""
    with hold(tmp_path, "fork") as holder:
        pids = {int(holder.stdout.readline()) for _ in range(2)}
        os.kill(holder.pid, signal.SIGKILL)
        try:
            holder.wait(5)
            with exclusive(tmp_path):
                pass
        finally:
            os.kill((pids - {holder.pid}).pop(), signal.SIGKILL)
