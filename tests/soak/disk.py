"""A disk that fills up, a folder that becomes read-only, and shards that are cut off or overwritten while in use.

The command ends with one line that says what is wrong, or does without the file and says so. Once the cause is gone the
same command continues, and what it leaves equals an undisturbed run. Knows Linux: the disk is a tmpfs, which root
mounts, and root gives up its right to write everywhere.
"""

import contextlib
import os
import random
import shutil
import subprocess
import time
from dataclasses import dataclass, field

from siglit.runtime.progress import Meter
from tests.soak.kills import LIMIT, WORKS, Undisturbed, differences, fill, prepare, problems_left, start, wait_for

DISTURBANCES = ("disk full", "folder read-only", "shard cut off", "shard overwritten", "shard replaced")
_ROOM = 64 << 20
"""Bytes of a disk that has room."""


@dataclass
class Tally:
    """What happened to all works under one disturbance."""

    done: int = 0
    met: int = 0
    """Runs that it ended or that had to do without a file; the others were over before, or needed less."""
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def run_disk(place, rounds, seed, until):
    """Disturb each work `rounds` times in each way that concerns it, {disturbance: Tally}; see `kills.run_kills`."""
    tallies = {name: Tally() for name in DISTURBANCES}
    if os.geteuid() != 0:
        print("not run: a disk that is full needs root, who may mount a tmpfs", flush=True)
    jobs = [
        (name, work, number)
        for number in range(rounds)
        for name in DISTURBANCES
        for work in WORKS
        if (name != "disk full" or os.geteuid() == 0) and ("shard" not in name or work.name == "train locked")
    ]
    undisturbed = {work: Undisturbed(work, place) for work in WORKS}
    with Meter("disturbing", len(jobs), "runs") as meter:
        for name, work, number in jobs:
            if time.monotonic() > until:
                break
            tally, begun = tallies[name], time.monotonic()
            chance = random.Random(f"{seed}-{name}-{work.title}-{number}")
            run_one = _shard if "shard" in name else _full if name == "disk full" else _read_only
            met, problems = run_one(name, undisturbed[work], place, chance)
            tally.done, tally.met = tally.done + 1, tally.met + met
            tally.seconds += time.monotonic() - begun
            for problem in problems:
                tally.failures.append(f"seed {seed}, {name}, {work.title}, round {number}: {problem}")
                print(f"FAILED: {tally.failures[-1]}", flush=True)
            meter.advance(1, f"{sum(len(t.failures) for t in tallies.values())} failures")
    return tallies


def _full(_, whole, place, chance):
    folder = place / "soak" / "disk"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with _mounted(folder):
        fill(folder, whole.work, place)
        least, most = _used(folder), _used(whole.folder)
        size = chance.randint(least + (16 << 10), max(most, least + (32 << 10)))
        _mount("-o", f"remount,size={size}", folder)
        run = start(whole.work, folder)
        code = _wait(run)
        met = code != 0 or "cannot write" in run.err
        problems = _judge(run, code, ("full", "No space")) if met else []
        _mount("-o", f"remount,size={_ROOM}", folder)
        return met, problems + _again(whole, folder, f"with {size:,} bytes")


def _read_only(_, whole, place, chance):
    folder = prepare(whole.work, place, "read-only")
    at = chance.uniform(0, whole.seconds)
    run = start(whole.work, folder, privileged=False)
    wait_for(run, folder, "time", at, 0)
    _chmod(folder, 0o555)
    code = _wait(run)
    met = code != 0
    problems = _judge(run, code, ("denied", "not permitted")) if met else []
    _chmod(folder, 0o755)
    return met, problems + _again(whole, folder, f"after {at:.2f} s")


def _shard(name, whole, place, chance):
    """Change a shard of the training split once training reads it."""
    folder = prepare(whole.work, place, "shard")
    shards = sorted((folder / "cache").glob("*/train/shard-*.h5"))
    chosen, other = chance.sample(shards, 2)
    content, metrics = chosen.read_bytes(), next((folder / "cache").glob("*/train")).parents[2] / "runs"
    run = start(whole.work, folder)
    begun = time.monotonic()
    while run.poll() is None and not list(metrics.glob("*/metrics.csv")) and time.monotonic() - begun < LIMIT:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, whole.seconds / 8))
    if name == "shard cut off":
        os.truncate(chosen, chance.randrange(len(content) // 4096) * 4096)
    elif name == "shard overwritten":
        with chosen.open("r+b") as file:
            file.write(other.read_bytes())
    else:
        shutil.copy(other, folder / "copy")
        os.replace(folder / "copy", chosen)
    code = _wait(run)
    problems = _judge(run, code, (chosen.name,)) if code != 0 else []
    if name == "shard replaced" and code != 0:
        problems = [f"exit {code}, but its map is still the whole shard: {run.err[-300:]}"]
    if code == 0:  # training was over, or had mapped another file
        problems = differences(folder, whole.folder)
        problems = [problem for problem in problems if chosen.name not in problem]
    chosen.write_bytes(content)
    return code != 0, problems + _again(whole, folder, chosen.name)


def _wait(run):
    try:
        return run.wait(LIMIT)
    except TimeoutError:
        return None


def _judge(run, code, words):
    """Whether a command that failed said in one line what is wrong."""
    lines = [line for line in run.err.splitlines() if line.startswith("siglit:")]
    if code is None:
        return [f"hangs: {run.err[-300:]}"]
    if code not in (0, 1, 2, -9) or "Traceback" in run.err:
        return [f"exit {code}: {run.err[-600:]}"]
    # Each rank may meet the cause by itself; a rank that only loses the others says no more than that.
    reasons = [line for line in lines if not line.startswith("siglit: another process")]
    if not all(any(word in line for word in words) for line in reasons) or not reasons:
        return [f"exit {code}, not one line that says {' or '.join(words)}: {run.err[-600:]}"]
    return [] if run.end(20) else ["the other processes live on"]


def _again(whole, folder, moment):
    """Problems of what is left, and of the same command once the cause is gone."""
    run = start(whole.work, folder)
    code = _wait(run)
    problems = problems_left(run, folder, "") + (differences(folder, whole.folder) if code == 0 else [])
    problems += [f"then exit {code}: {run.err[-600:]}"] if code != 0 else []
    return [f"{moment}: {problem}" for problem in problems]


def _used(folder):
    return sum(-(-path.lstat().st_size // 4096) * 4096 for path in folder.rglob("*") if not path.is_dir())


def _chmod(folder, mode):
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not path.is_symlink() and path.name != "logs":
            path.chmod(mode)


def _mount(*words):
    subprocess.run(["mount", *words], check=True)


@contextlib.contextmanager
def _mounted(folder):
    _mount("-t", "tmpfs", "-o", f"size={_ROOM}", "tmpfs", folder)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
