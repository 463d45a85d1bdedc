"""A bit flipped, half cut off, emptied: every kind of file that siglit writes, and what its reader does about it.

The place is filled by running every command, and a file that no kind covers is a failure. Each damage gets a copy of
the place, and then the commands that read the file. A damage is

- named: exit status 1 or 2 and one line, which has the file's name;
- repaired: a line that has the file's name, and the results of an undamaged run;
- harmless: the results of an undamaged run, and the file is not used, or is written again;
- not noticed: other results, or none and no file named. Allowed only for kinds that say why nothing checks them.

Knows the names of files, not their formats.
"""

import json
import random
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from siglit.runtime.progress import Meter
from tests.soak.kills import checkpoint_differences, metrics_rows
from tests.soak.processes import Running

LIMIT = 120
_FILE = ("-c", "experiment.yaml")
_UNLOCKED = ("--mode", "unlocked", "--output_dir", "runs/unlocked")
_CORRUPT = ("--data.corrupt", "[image]", "--data.corrupt_share", "0.1")
STEPS = ("--train.steps", "8", "--train.val_every", "2", "--train.log_every", "1")
VERIFY = ("cache", "verify", "cache/small")
RESUME = ("train", *_FILE, "--resume", *STEPS, *_CORRUPT)
RETRIEVAL = ("eval-retrieval", *_FILE, "--eval.index", "HNSW8")
RETRIEVAL_UNLOCKED = ("eval-retrieval", *_FILE, *_UNLOCKED)
SEARCH = ("search", "a red square", *_FILE)
REPORT = ("report", *_FILE)
PLOT = ("plot", "runs/small")
IMPORT = (
    *("cache", "import", "imported", "--model", "a model"),
    *("--embeddings", "export/img_emb", "--metadata", "export/metadata"),
)
MERGE = ("cache", "merge", "merged", "cache/small/train", "cache/small/val")
FILLING = [
    RETRIEVAL,
    ("eval-zeroshot", *_FILE, "--eval.classes", "colors.json"),
    ("eval-fewshot", *_FILE, "--eval.shots", "[1,2]"),
    ("eval-probe", *_FILE),
    ("eval-logits", *_FILE),
    ("plan", *_FILE, "--examples-per-second", "100", "--gpu-memory", "8"),
    SEARCH,
    REPORT,
    PLOT,
    ("cache", "export", "cache/small/val", "export"),
    ("train", *_FILE, *_UNLOCKED, *STEPS),
    RETRIEVAL_UNLOCKED,
]
"""The commands that leave every kind of file, after precompute and a training that was stopped."""


@dataclass(frozen=True)
class Kind:
    """Files that are written and read alike."""

    name: str
    files: str
    """Glob, from the place."""
    readers: tuple[tuple[str, ...], ...] = ()
    """Command lines that read them; none for what only people read."""
    unchecked: str = ""
    """Why nothing notices some damages, where that is on purpose."""


KINDS = [
    Kind("cache shard", "cache/small/train/shard-*.h5", (VERIFY,)),
    Kind("cache index", "cache/small/val/index.json", (VERIFY, RETRIEVAL)),
    Kind("token ids", "cache/small/*/tokens-*.npy", (RETRIEVAL, RESUME)),
    Kind("last checkpoint", "runs/small/checkpoints/last.ckpt", (RESUME, RETRIEVAL)),
    Kind("previous checkpoint", "runs/small/checkpoints/previous.ckpt", (RESUME,)),
    Kind("tokenizer model", "runs/small/tokenizer.model", (RETRIEVAL, RESUME)),
    Kind("tokenizer's settings", "runs/small/tokenizer.json", (RESUME,)),
    Kind("noise embeddings", "runs/small/noise-*.npy", (RESUME,)),
    Kind("record of the experiment", "runs/small/experiment.yaml", (RESUME,)),
    Kind("curves", "runs/small/metrics.csv", (REPORT, RESUME), "a digit that stays a digit: text for people"),
    Kind("summary", "runs/small/summary.json", (REPORT, RESUME), "a digit that stays a digit: text for people"),
    Kind("exact faiss index", "runs/small/images-val-????????????????.faiss", (SEARCH,)),
    Kind("approximate faiss index", "runs/small/images-val-*-HNSW8.faiss", (RETRIEVAL,)),
    Kind("its JSON", "runs/small/images-val-*-HNSW8.json", (RETRIEVAL,), "the seconds that building took"),
    *(
        Kind(f"{name} result", f"runs/small/{name}.json", (REPORT,), "a digit that stays a digit: text for people")
        for name in ("retrieval", "zeroshot", "fewshot", "probe", "logits")
    ),
    Kind(
        "embeddings of a trained tower: shard",
        "runs/unlocked/embeddings/*/*/shard-*.h5",
        (("cache", "verify", "{parent}"), RETRIEVAL_UNLOCKED),
        "rows: as of every cache, their checksum is for `siglit cache verify`",
    ),
    Kind("embeddings of a trained tower: index", "runs/unlocked/embeddings/*/*/index.json", (RETRIEVAL_UNLOCKED,)),
    Kind("embeddings of a trained tower: token ids", "runs/unlocked/embeddings/*/*/*.npy", (RETRIEVAL_UNLOCKED,)),
    Kind("exported embeddings", "export/img_emb/*.npy", (IMPORT,), "a format of others, without checksums"),
    Kind("exported metadata", "export/metadata/*.parquet", (IMPORT,), "a format of others, without checksums"),
]
ALIKE = (
    "cache/small/train/index.json",
    "cache/small/val/shard-*.h5",
    "cache/small/val/mean-*.npy",  # written and read as token ids are; damaged in tests/data/test_mean_row.py
    "runs/unlocked/checkpoints/*.ckpt",
    *(f"runs/unlocked/{name}" for name in ("*.json", "*.model", "*.csv", "*.yaml", "*.faiss")),
)
"""Files of a kind that is damaged elsewhere."""
FOR_PEOPLE = (
    *(f"runs/small/{name}" for name in ("plan.json", "report.html", "zeroshot.npy", "zeroshot.png")),
    "export/mean.npy",
)
"""Files that no command reads; neither is the picture of `siglit plot`."""
DAMAGES = ("bit flipped", "cut in half", "emptied")


@dataclass
class Tally:
    """What became of the damages to one kind."""

    unchecked: str = ""
    outcomes: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def run_damages(place, flips, seed, until):
    """Damage one file after the other, {name of a kind: Tally}.

    Args:
        place: a project, see `project.make_damage_place`.
        flips: bits to flip for each kind and each of its readers.
        seed: of what is flipped.
        until: time.monotonic() after which nothing more is damaged.
    """
    tallies = {kind.name: Tally(kind.unchecked) for kind in KINDS if kind.readers}
    _check_all_are_covered(place)
    readers = list(dict.fromkeys(reader for kind in KINDS for reader in kind.readers if "{parent}" not in reader))
    lock = threading.Lock()
    jobs = [
        (kind, reader, damage, number)
        for kind in KINDS
        for reader in kind.readers
        for damage in DAMAGES
        for number in range(flips if damage == DAMAGES[0] else 1)
    ]
    with ThreadPoolExecutor(2) as lanes, Meter("damaging", len(jobs), "files") as meter:
        results = lanes.map(lambda words: _undisturbed(place, words), readers)
        undisturbed = dict(zip(readers, results, strict=True))

        def do(job):
            if time.monotonic() > until:
                return
            kind, reader, damage, number = job
            begun = time.monotonic()
            outcome, problem = _damage(place, kind, reader, damage, f"{seed}-{number}", undisturbed)
            with lock:
                tally = tallies[kind.name]
                tally.outcomes[outcome] += 1
                tally.seconds += time.monotonic() - begun
                if problem:
                    tally.failures.append(problem)
                    print(f"FAILED: {problem}", flush=True)
                meter.advance(1, f"{sum(len(t.failures) for t in tallies.values())} failures")

        list(lanes.map(do, jobs))
    return tallies


def _check_all_are_covered(place):
    """Every file that the commands have left is of a kind, so that a new one is not forgotten."""
    globs = [*(kind.files for kind in KINDS), *ALIKE, *FOR_PEOPLE]
    covered = {path for files in globs for path in place.glob(files)}
    files = [path for part in ("cache", "runs", "export") for path in sorted((place / part).rglob("*"))]
    forgotten = [str(path.relative_to(place)) for path in files if path.is_file() and path not in covered]
    assert not forgotten, f"no kind covers {', '.join(forgotten)}"
    for kind in KINDS:
        assert any(place.glob(kind.files)), f"no file of the kind {kind.name}"


def _undisturbed(place, words):
    folder = _copy(place, f"whole-{threading.get_ident()}-{time.monotonic_ns()}")
    run = Running(words, folder, _logs(folder))
    assert run.wait(LIMIT) == 0, run.err
    result = _result(words, folder, run)
    return result, folder


def _damage(place, kind, words, damage, seed, undisturbed):
    """(outcome, description of the problem if it is not acceptable)."""
    chance = random.Random(f"{seed}-{kind.name}-{damage}-{words[0]}")
    chosen = chance.choice(sorted(place.glob(kind.files))).relative_to(place)
    folder = _copy(place, f"damaged-{time.monotonic_ns()}-{threading.get_ident()}")
    path = folder / chosen
    how = damage_file(path, damage, chance)
    words_here = [word.format(parent=chosen.parent) for word in words]
    run = Running(words_here, folder, _logs(folder))
    try:
        code = run.wait(LIMIT)
    except TimeoutError:
        code = None
    outcome, problem = _judge(kind, words, path, code, run, folder, undisturbed.get(words))
    shutil.rmtree(folder)
    if problem:
        problem = f"seed {seed}, {chosen}, {how}, `siglit {' '.join(words_here)}`: {problem}"
    return outcome, problem


def damage_file(path, damage, chance):
    """Damage a file, and say where."""
    content = bytearray(path.read_bytes())
    if damage == "bit flipped":
        # Most of a small shard is padding: three of four flips meet bytes that say something.
        filled = (
            [place for place, byte in enumerate(content) if byte] if chance.random() < 0.75 else range(len(content))
        )
        at, bit = chance.choice(filled), chance.randrange(8)
        content[at] ^= 1 << bit
        path.write_bytes(content)
        return f"bit {bit} of byte {at:,} of {len(content):,} flipped"
    path.write_bytes(content[: len(content) // 2] if damage == "cut in half" else b"")
    return damage


def _judge(kind, words, path, code, run, folder, undisturbed):
    said = [line for line in (run.err + run.out).splitlines() if path.name in line]
    last = (run.err.strip() or run.out.strip() or "nothing printed")[-400:]
    if code is None:
        return "hangs", "hangs"
    if "Traceback" in run.err or code < 0:
        return "crash", f"exit {code}: {last}"
    if code != 0:
        errors = [line for line in run.err.splitlines() if line.startswith("siglit:")]
        if code in (1, 2) and said and len(errors) <= 1:
            return "named", None
        return "not named", f"exit {code}, but the file is not named in one line: {last}"
    if said and not (words[0] in ("search", "report") and not run.err):
        return "repaired", None
    if words[:2] == ("cache", "verify"):
        return ("not noticed", "not noticed")
    expected, whole = undisturbed
    if _same(words, _result(words, folder, run), expected, folder, whole):
        return "harmless", None
    return "not noticed", None if kind.unchecked else f"not noticed, with another result: {last}"


def _result(words, folder, run):
    """What a command has computed, without times."""
    if words[0] == "eval-retrieval":
        run_folder = folder / ("runs/unlocked" if "unlocked" in words else "runs/small")
        return _without_times(json.loads((run_folder / "retrieval.json").read_text()))
    if words[0] == "report":
        return (folder / "runs/small/report.html").read_bytes()
    if words[:2] == ("cache", "import"):
        return (folder / "imported/index.json").read_bytes()
    return run.out if words[0] != "train" else None


def _same(words, result, expected, folder, whole):
    if words[0] != "train":
        return result == expected
    one, other = folder / "runs/small", whole / "runs/small"
    return not checkpoint_differences(one / "checkpoints/last.ckpt", other / "checkpoints/last.ckpt") and metrics_rows(
        one / "metrics.csv"
    ) == metrics_rows(other / "metrics.csv")


def _without_times(value):
    if not isinstance(value, dict):
        return value
    return {k: _without_times(v) for k, v in value.items() if "seconds" not in k and "ms_per" not in k}


def _copy(place, name):
    folder = place.parent / "damages" / name
    shutil.copytree(place, folder, symlinks=True)
    return folder


def _logs(folder):
    path = folder / "logs"
    path.mkdir()
    return path
