"""All that CUDA must show, on one GPU: the tests, the loss, training, precompute and retrieval.

    python -m benchmarks.on_gpu --out results                      # everything, each part at most 9 minutes
    python -m benchmarks.on_gpu --out results --part loss          # one part
    python -m benchmarks.on_gpu --out results --merge              # measure nothing; merge the parts in the folder
    python -m benchmarks.on_gpu --out results --tiny               # a minute, on any device: does it run through?

Writes PART.json after every measurement, and all parts of the folder as on_gpu.json and on_gpu.md; on_gpu.log holds
what the measurements print. Each measurement has a process of its own: none is measured in memory that another one left
behind, and after a CUDA error, which no later call of that process survives, the others still run.

Needs no network and no data: pictures, rows, captions and weights are random. A GPU machine that has torch, lightning,
timm, transformers, h5py, pyarrow and pytest gets what else is needed as wheels (22 MiB), downloaded elsewhere by

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
        --platform manylinux2014_x86_64 --dest wheels faiss-cpu braceexpand 'jsonargparse>=4.53,<5' \
        docstring-parser typeshed-client open_clip_torch ftfy wcwidth

and put there by `pip install --no-index --no-deps --target site wheels/*.whl; export PYTHONPATH=site`. open_clip_torch
(with ftfy and wcwidth) may be missing: its rows then say so. Without a .git folder, `--commit` names the commit.
"""

import argparse
import functools
import importlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.on_gpu.record import PARTS, Record, merge
from siglit.runtime.files import write_json

MEASUREMENTS = {
    "tests": ("loss", "training", "evaluation", "others"),
    "loss": ("locked", "both_sides", "memory", "large_batch", "very_large_batch"),
    "train": ("step", "host_syncs"),
    "precompute": ("vit_b16", "vit_b8"),
    "retrieval": ("exact_search", "against_cpu"),
}
"""Functions of the part's module, in their order."""
BUDGET = 520.0
"""Seconds of a part: with the start of the last process, less than nine minutes."""
_LEAST = 20.0
"""Seconds within which a measurement could not even import its packages."""
_SHARE = 0.6
"""Of the time that is left, how much a measurement may take before the last: one that hangs must leave some."""
_ROOT = Path(__file__).parents[2]


def main(words: list[str] | None = None) -> int:
    """Run the parts; return 0, 1 if something failed, 2 if there is no GPU."""
    args = _parse(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.measure:
        measure(args.measure, args.json, device, tiny=args.tiny)
        return 0
    if device == "cpu" and not args.tiny and not args.merge:
        print("no CUDA device here: run this on a machine with a GPU, or with --tiny to try it out", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    results = [] if args.merge else [run_part(part, args) for part in ([args.part] if args.part else PARTS)]
    print(merge(args.out))
    return int(any(entry["problems"] for result in results for entry in result["measurements"].values()))


def _parse(words: list[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        "python -m benchmarks.on_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--out", type=Path, default=Path("runs/on_gpu"), help="folder of the results (default: %(default)s)"
    )
    options.add_argument("--part", choices=PARTS, help="what to measure (default: everything)")
    options.add_argument("--tiny", action="store_true", help="small sizes, on a CPU where there is no GPU")
    options.add_argument("--merge", action="store_true", help="measure nothing, merge what lies in the folder")
    options.add_argument("--commit", help="the commit, where there is no .git folder")
    options.add_argument(
        "--budget-seconds", type=float, default=BUDGET, help="a part ends after this (default: %(default)g)"
    )
    options.add_argument("--measure", nargs="+", metavar="PART.NAME", help=argparse.SUPPRESS)
    options.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    return options.parse_args(words)


def run_part(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run the measurements of a part, each in its own process, until the budget is used up; return its results."""
    end = time.monotonic() + args.budget_seconds
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.on_gpu {shlex.join(sys.argv[1:])}".strip(),
        "stamp": {},
        "measurements": {},
        "left_out": [{"name": name, "reason": "not begun"} for name in MEASUREMENTS[part]],
    }
    # The start of a process takes longer than anything tiny.
    groups = [MEASUREMENTS[part]] if args.tiny else [(name,) for name in MEASUREMENTS[part]]
    path = args.out / f"{part}.json"
    write_json(path, result)
    for names in groups:
        left = end - time.monotonic()
        if left < _LEAST:
            reason = f"{left:.0f} s of the {args.budget_seconds:g} s were left"
            result["left_out"] = [{**each, "reason": reason} for each in result["left_out"]]
            break
        print(f"{part}: {', '.join(names)} …", file=sys.stderr, flush=True)
        found = _in_a_process(part, names, left if names[-1] == MEASUREMENTS[part][-1] else _SHARE * left, args)
        result["stamp"] = result["stamp"] or found["stamp"] | ({"commit": args.commit} if args.commit else {})
        result["measurements"] |= found["measurements"]
        result["left_out"] = [each for each in result["left_out"] if each["name"] not in result["measurements"]]
        write_json(path, result)
        merge(args.out)
    write_json(path, result)
    return result


def _in_a_process(part: str, names: tuple[str, ...], seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    """Run measurements in a process that is killed, with all it has started, when the time is over."""
    # What is killed last may still be writing while the folder is removed.
    temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with temporary as folder, (args.out / "on_gpu.log").open("a", encoding="utf-8") as log:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.on_gpu", "--measure", *(f"{part}.{name}" for name in names)]
        command += ["--json", str(path), *["--tiny"] * args.tiny]
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # Temporary files of a process that is killed go with the folder; what one has compiled serves the next.
        compiled = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
        env = {"TORCHINDUCTOR_CACHE_DIR": compiled, **os.environ, "TMPDIR": folder, "HF_HUB_OFFLINE": "1"}
        env["PYTHONPATH"] = os.pathsep.join(paths)
        child = subprocess.Popen(command, cwd=_ROOT, env=env, stdout=log, stderr=log, process_group=0)
        try:
            ended = f"its process ended with status {child.wait(seconds)}, see on_gpu.log"
        except subprocess.TimeoutExpired:
            ended = f"not finished after {seconds:.0f} s, which was its time"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        empty: dict[str, Any] = {"stamp": {}, "measurements": {}}
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty
    if not found["measurements"]:
        found["measurements"] = {
            names[0]: {"finished": False, "seconds": None, "rows": [], "figures": {}, "problems": []}
        }
    for entry in found["measurements"].values():
        if not entry["finished"]:
            entry["problems"].append(ended)
    return found


def measure(names: list[str], path: Path, device: str, *, tiny: bool) -> None:
    """Run measurements PART.NAME in this process, and write what they find."""
    logging.basicConfig(level=logging.WARNING)
    record = Record(path, device)
    for each in names:
        part, name = each.split(".")
        # Imported inside of the measurement: a package that is missing is its problem.
        module = functools.partial(importlib.import_module, f"benchmarks.on_gpu.{part}")
        record.measure(name, lambda module=module, name=name: getattr(module(), name)(record, tiny))


if __name__ == "__main__":
    # As an exception, which ends the process that measures too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
