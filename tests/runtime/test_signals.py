"""Precompute, stopped, killed and started twice: no truncated file, no process left over, the same cache at the end."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from siglit.cache import EmbeddingCache, exclusive
from siglit.runtime.signals import Terminated, stopping_at_signals
from tests.commands.test_precompute import rows_by_key
from tests.conftest import ROOT, run_siglit

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ROUNDS = int(os.environ.get("SIGLIT_KILL_ROUNDS", "2"))
"""Random moments to kill at; 30 take minutes."""
PHASES = {
    "0 start-up": None,
    "1 train": (1, 39),
    "2 train's index": (40, 40),
    "3 val": (41, 52),
    "4 val's index": (53, 53),
}
"""Parts of a run on `slow`, in order, and how many files of its 40 + 1 + 12 + 1 are committed in them."""


def start(project, path, *words):
    """Start precompute in a session of its own, with images that decode slowly."""
    return subprocess.Popen(
        [sys.executable, "-m", "siglit", "precompute", "-c", "experiment.yaml", "--cache.path", path, *words],
        cwd=project,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_shard(project, path, process, seconds=60):
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until and not any((project / path).glob("*/shard-*.h5")):
        time.sleep(0.002)
    assert any((project / path).glob("*/shard-*.h5")), process.communicate()


def committed(folder):
    """Number of committed shards and indices."""
    return len(list(folder.glob("*/shard-*.h5"))) + len(list(folder.glob("*/index.json")))


def wait_until_committed(folder, count, process, seconds=60):
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until and committed(folder) < count:
        time.sleep(0.001)
    assert committed(folder) >= count, process.communicate()


def members(session):
    """Process ids of a session that have not ended."""
    ids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            ids.append(int(stat.parent.name))
    return ids


def gone(session, seconds):
    until = time.monotonic() + seconds
    while members(session) and time.monotonic() < until:
        time.sleep(0.05)
    return not members(session)


@pytest.fixture
def slow(project):
    """The project with one image a shard, so that there is something to interrupt."""
    text = (project / "experiment.yaml").read_text().replace("shard_size: 8, batch_size: 5", "shard_size: 1")
    (project / "experiment.yaml").write_text(text)
    return project


def test_an_error_that_a_library_raises_for_a_signal_becomes_the_signal():
    """h5py may turn the handler's exception into a TypeError."""
    with pytest.raises(Terminated), stopping_at_signals():  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise TypeError("operation not defined") from None
    with pytest.raises(ValueError, match="our own"), stopping_at_signals():
        raise ValueError("our own")


@pytest.mark.parametrize(
    ("devices", "number", "code"),
    [
        (1, signal.SIGTERM, 143),
        pytest.param(1, signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_at_once(slow, number, code, devices):
    """Exit code, one line, no process left; SIGTERM to the first process, Ctrl-C to all as a terminal sends it."""
    process = start(slow, "stopped", "--cache.devices", str(devices))
    wait_for_shard(slow, "stopped", process)
    begun = time.monotonic()
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - begun < 10
    assert process.returncode == code, err
    assert [line for line in err.splitlines() if "stopped" in line] == ["stopped; completed work is kept"]
    assert "Traceback" not in err
    assert gone(process.pid, 8)
    assert not (slow / "stopped/train/index.json").exists()


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_that_meets_a_destructor_is_not_lost(number, kind, monkeypatch):
    """Python drops what a handler raises there; the block ends with it all the same, and nothing else is printed."""
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: dropped.append(report.exc_type))

    class Last:
        def __del__(self):
            signal.raise_signal(number)

    class Faulty:
        def __del__(self):
            raise ValueError("its own")

    before = signal.getsignal(number), sys.unraisablehook
    with pytest.raises(kind), stopping_at_signals():  # noqa: PT012
        Faulty()
        Last()
    assert dropped == [ValueError]
    assert (signal.getsignal(number), sys.unraisablehook) == before


def test_what_torch_raises_for_a_killed_worker_where_python_drops_it_is_not_printed(monkeypatch):
    """Its handler of SIGCHLD may run in a fork hook or a destructor too; the loader raises again for the next batch."""
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: dropped.append(str(report.exc_value)))

    class Forking:
        def __init__(self, text):
            self.text = text

        def __del__(self):
            raise RuntimeError(self.text)

    with stopping_at_signals():
        Forking("DataLoader worker (pid 19470) is killed by signal: Killed. ")
        Forking("another error")
    assert dropped == ["another error"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_killed_alone_ends_the_run(slow, rank):
    """The others do not wait for it; a restart completes, equal to an undisturbed run."""
    process = start(slow, "killed", "--cache.devices", "2")
    wait_for_shard(slow, "killed", process)
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in members(process.pid)}
    ranks = [pid for pid, env in environments.items() if b"\0LOCAL_RANK=1" in env and Path(f"/proc/{pid}").exists()]
    second = min(ranks)
    os.kill(process.pid if rank == 0 else second, signal.SIGKILL)
    assert process.wait(20) != 0
    assert gone(process.pid, 10)
    process.communicate()
    run_siglit("precompute", "-c", "experiment.yaml", "--cache.path", "killed", cwd=slow, check=0)
    run_siglit("precompute", "-c", "experiment.yaml", "--cache.path", "whole", cwd=slow, check=0)
    for split in ("train", "val"):
        assert rows_by_key(slow / "killed" / split) == rows_by_key(slow / "whole" / split)
        assert not list((slow / "killed" / split).glob("*.tmp*"))


@pytest.mark.slow
def test_killed_at_random_moments_equals_undisturbed(slow):
    """SIGKILL to the whole run over all of its life, 1 and 2 processes in turn; SIGLIT_KILL_ROUNDS moments.

    A chain is up to three kills, each later in the work than the one before, and a run that is let through; then the
    cache is the undisturbed one, and the next chain begins with an empty folder.
    """
    whole, killed = slow / "whole", slow / "killed"
    begun = time.monotonic()
    process = start(slow, "whole")
    wait_for_shard(slow, "whole", process)
    first_shard = time.monotonic() - begun
    assert process.wait(60) == 0, process.communicate()
    process.communicate()
    chance = random.Random(0)
    kills = 0
    while kills < ROUNDS:
        for phase in sorted(chance.sample(list(PHASES), min(3, ROUNDS - kills))):
            devices = 1 + kills % 2
            process = start(slow, "killed", "--cache.devices", str(devices))
            if phase == "0 start-up":
                time.sleep(chance.uniform(0, devices * first_shard))
            else:
                low, high = PHASES[phase]
                wait_until_committed(killed, chance.randint(low, high), process)
                time.sleep(chance.uniform(0, 0.02))
            if process.poll() is None:
                kills += 1
                print(f"{kills}: {devices} devices, {phase}, {committed(killed)} files of {committed(whole)} are there")
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
            else:  # it was quicker than the moment
                assert process.returncode == 0, process.communicate()
                process.communicate()
        run_siglit(
            *("precompute", "-c", "experiment.yaml", "--cache.path", "killed"),
            *("--cache.devices", str(chance.randint(1, 2))),
            cwd=slow,
            check=0,
        )
        for split in ("train", "val"):
            assert rows_by_key(killed / split) == rows_by_key(whole / split)
            assert EmbeddingCache(killed / split).verify() == []
            assert (killed / split / "index.json").read_bytes() == (whole / split / "index.json").read_bytes()
        assert not list(killed.rglob("*.tmp*"))
        shutil.rmtree(killed)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_run_on_the_same_folder_names_the_first(project, devices):
    with exclusive(project / "mine" / "val"):
        words = ["--cache.path", "mine", "--cache.devices", str(devices)]
        done = run_siglit("precompute", "-c", "experiment.yaml", *words, cwd=project, check=2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"process {os.getpid()}, since" in done.stderr
    assert not list((project / "mine").rglob("*"))[2:]
