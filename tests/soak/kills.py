"""SIGKILL at random moments of precompute and training, and what must be left: what an undisturbed run leaves.

A chain starts in an empty folder: the same command is killed a few times, in whatever phase it is, and is then let
through. After every kill its caches are sound and its checkpoints readable; at the end every file equals that of a run
that nothing disturbed, and there is no other file. Knows nothing of damaged files; see `damage.py`.
"""

import csv
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

import siglit
from siglit.errors import UserError
from siglit.runs import checkpoints
from siglit.runtime.progress import Meter
from tests.soak.processes import Running

LIMIT = 120
"""Seconds after which a command hangs."""
GRACE = 20
"""Seconds in which the other processes of a run must end after one was killed; Lightning looks every 5 s."""
VICTIMS = ("all", "first", "other")
_LANES = 2


@dataclass(frozen=True)
class Work:
    """A command to kill."""

    name: str
    words: tuple[str, ...]
    ranks: int
    trains: bool

    @property
    def title(self):
        return f"{self.name}, {self.ranks} process{'es' if self.ranks > 1 else ''}"


_PRECOMPUTE = ("precompute", "--cache.shard_size", "1")
_TRAIN = ("train", "--resume", "--train.steps", "14", "--train.val_every", "2", "--train.log_every", "1")
_UNLOCKED = ("--mode", "unlocked", "--data.random_crop", "0.5", "--data.random_flip", "true")
WORKS = [
    *(Work("precompute", (*_PRECOMPUTE, "--cache.devices", str(n)), n, trains=False) for n in (1, 2)),
    *(Work("train locked", (*_TRAIN, "--train.devices", str(n)), n, trains=True) for n in (1, 2)),
    *(Work("train unlocked", (*_TRAIN, *_UNLOCKED, "--train.devices", str(n)), n, trains=True) for n in (1, 2)),
]


@dataclass
class Tally:
    """What happened to one kind of work."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VICTIMS, 0))
    chains: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


class Undisturbed:
    """A run of a work that nothing disturbs: its folder, its time, and how often its files change."""

    def __init__(self, work, place):
        self.work = work
        self.folder = prepare(work, place, f"whole-{WORKS.index(work)}")
        begun, watch = time.monotonic(), Changes(self.folder)
        run = start(work, self.folder)
        while run.poll() is None:
            watch.look()
            time.sleep(0.001)
        self.seconds, self.changes = time.monotonic() - begun, watch.count
        assert run.poll() == 0, run.err


def run_kills(place, kills, seed, until, only=None):
    """Kill, {title of a work: Tally}.

    Args:
        place: a project with caches and a run, see `tests.conftest.prepared`.
        kills: in all, over all works in turn.
        seed: of the chains; chain n draws from (seed, n).
        until: time.monotonic() after which no chain begins.
        only: number of the one chain to run; None: as many as give `kills`.
    """
    undisturbed = [Undisturbed(work, place) for work in WORKS]
    tallies = {work.title: Tally() for work in WORKS}
    lock, chains = threading.Lock(), iter(range(10**6) if only is None else [only])

    with Meter("killing", kills, "kills") as meter, ThreadPoolExecutor(_LANES) as lanes:

        def chain_after_chain(_):
            while True:
                with lock:
                    done = sum(sum(tally.kills.values()) for tally in tallies.values())
                    number = None if done >= kills or time.monotonic() > until else next(chains, None)
                if number is None:
                    return
                whole = undisturbed[number % len(WORKS)]
                tally = tallies[whole.work.title]
                begun = time.monotonic()

                def count(victim, tally=tally):
                    with lock:
                        tally.kills[victim] += 1
                        meter.advance(1, f"{sum(len(t.failures) for t in tallies.values())} failures")

                problems = run_chain(whole, place, number, seed, count)
                with lock:
                    tally.chains += 1
                    tally.seconds += time.monotonic() - begun
                    for problem in problems:
                        tally.failures.append(f"seed {seed}, chain {number}: {problem}")
                        print(f"FAILED: {tally.failures[-1]}", flush=True)

        list(lanes.map(chain_after_chain, range(_LANES)))
    return tallies


def run_chain(whole, place, number, seed, count):
    """Kill one folder's command a few times and let it through; the problems, none if all is well."""
    chance = random.Random(f"{seed}-{number}")
    work, folder = whole.work, prepare(whole.work, place, f"chain-{number}")
    for _ in range(chance.randint(2, 5)):
        victim = chance.choice(VICTIMS)
        moment = chance.choice(["time", "change"])
        at = chance.uniform(0, whole.seconds) if moment == "time" else chance.randint(1, whole.changes)
        description = f"{work.title}, SIGKILL to {victim} at {moment} {at:.4g}"
        run = start(work, folder)
        wait_for(run, folder, moment, at, chance.uniform(0, 0.01))
        if run.poll() is not None:  # the rest was quicker than the moment
            if run.poll() != 0:
                return [f"{description}: exit {run.poll()} before that: {run.err}"]
            break
        killed = _kill(run, victim, chance)
        if killed:
            count(killed)
        if not run.end(GRACE if killed else LIMIT):
            return [f"{description}: the other processes live on"]
        problems = problems_left(run, folder, victim)
        if problems:
            return [f"{description}: {problem} ({folder})" for problem in problems]
    run = start(work, folder)
    try:
        code = run.wait(LIMIT)
    except TimeoutError as error:
        return [str(error)]
    problems = [f"{work.title}, at the end: exit {code}: {run.err}"] if code else differences(folder, whole.folder)
    if not problems:
        shutil.rmtree(folder)
    return [f"{work.title}, at the end: {problem} ({folder})" for problem in problems]


def differences(folder, whole):
    """What differs between the files of a folder and those of an undisturbed run."""
    names, expected = ({path.relative_to(f) for path in _files(f)} for f in (folder, whole))
    problems = [f"{name} is missing" for name in sorted(expected - names)]
    problems += [f"{name} is left over" for name in sorted(names - expected)]
    for name in sorted(names & expected):
        one, other = folder / name, whole / name
        if name.suffix == ".ckpt":
            problems += [f"{name}: {what} differs" for what in checkpoint_differences(one, other)]
        elif name.name == "metrics.csv":
            problems += [] if metrics_rows(one) == metrics_rows(other) else [f"{name} differs"]
        elif name.name != "summary.json" and one.read_bytes() != other.read_bytes():  # a summary has times
            problems.append(f"{name} differs")
    return problems


def prepare(work, place, name):
    """A new folder for a run; see `fill`."""
    folder = place / "soak" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return fill(folder, work, place)


def fill(folder, work, place):
    """Fill an empty folder with the same relative paths for all runs of a work, so that even its record is the same."""
    (folder / "logs").mkdir()
    (folder / "images").symlink_to(place / "images")
    for file in ("train.csv", "val.csv", "experiment.yaml"):
        shutil.copy(place / file, folder / file)
    if work.trains and work.name != "train unlocked":
        shutil.copytree(place / "cache", folder / "cache", ignore=shutil.ignore_patterns("tokens-*"))
    return folder


def start(work, folder, **options):
    """Start the work in its folder."""
    command, *words = work.words
    return Running((command, "-c", "experiment.yaml", *words), folder, folder / "logs", ranks=work.ranks, **options)


def _files(folder):
    return [path for part in ("cache", "runs") for path in (folder / part).rglob("*") if path.is_file()]


class Changes:
    """Counts how often the files of a run have changed, the temporary ones included."""

    def __init__(self, folder):
        self._folder, self.count = folder, 0
        self._seen = self._state()

    def look(self):
        state = self._state()
        self.count += state != self._seen
        self._seen = state

    def _state(self):
        state = set()
        for path in _files(self._folder):
            try:
                status = path.stat()
            except OSError:  # renamed meanwhile
                continue
            state.add((str(path), status.st_size, status.st_mtime_ns))
        return state


def wait_for(run, folder, moment, at, delay):
    """Wait for the seconds, or the change of the files, or the end of the run, if it comes before."""
    begun, watch = time.monotonic(), Changes(folder)
    while run.poll() is None and time.monotonic() - begun < LIMIT:
        if moment == "time" and time.monotonic() - begun >= at:
            return
        if moment == "change":
            watch.look()
            if watch.count >= at:
                time.sleep(delay)
                return
        time.sleep(0.0005)


def _kill(run, victim, chance):
    """Kill, all where there is no process of this kind; what was killed, None if the run had just ended."""
    processes = run.processes()
    chosen = [pid for pid in processes if (pid == run.pid) == (victim == "first")]
    if victim == "all" or not chosen:
        run.kill_all()
        return "all" if processes else None
    run.kill(chance.choice(chosen))
    return victim


def problems_left(run, folder, victim):
    """Whether what is there is whole, and whether a survivor has said in one line why it ended."""
    problems = []
    for path in sorted({shard.parent for shard in (folder / "cache").rglob("shard-*.h5")}):
        for verification in siglit.cache_verify(str(path)).caches:
            problems += [problem for problem in verification.problems if "is not complete" not in problem]
    for path in (folder / "runs").glob("*/checkpoints"):
        try:
            checkpoints.newest(path)
        except UserError as error:
            problems.append(str(error))
    if victim == "other" and "Traceback" in run.err:
        problems.append(f"a traceback: {run.err}")
    return problems


def checkpoint_differences(one, other):
    """Names of the entries of two checkpoints that are not equal bit for bit."""
    one, other = (torch.load(path, map_location="cpu", weights_only=True) for path in (one, other))
    for checkpoint in (one, other):
        loops = checkpoint["loops"]["fit_loop"]
        for name in [name for name in loops if ".val_loop." in name]:
            del loops[name]  # how often Lightning has validated in this epoch: nothing depends on it
    return [name for name in sorted(one.keys() | other.keys()) if not _equal(one.get(name), other.get(name))]


def _equal(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def metrics_rows(path):
    """Rows of metrics.csv without what a clock has measured."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "train/examples_per"))} for row in rows]
