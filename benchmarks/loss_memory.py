"""Peak memory and time of one contender of `benchmarks.loss` in a process of its own.

    python -m benchmarks.loss_memory --contender siglit --n 8192 --json one.json

Added bytes are those beyond inputs and gradients. On a CPU they come from the kernel's high-water mark of resident
memory, set back after a warm-up: it counts what every allocator takes and, unlike sampling, misses nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.common import begin_peak, parser, peak, plain_options
from benchmarks.loss_contenders import DTYPES, OURS, Pairs, contenders
from siglit.loss import elementwise

_WARM_UP = 3000


def main() -> None:
    """Warm up, take one value with its gradients, write what it took."""
    options = parser(__doc__)
    options.add_argument("--contender", default=OURS[0], help="its name in the table of benchmarks.loss")
    options.add_argument("--n", type=int, default=8192, help="pairs")
    options.add_argument("--dim", type=int, default=768, help="embedding width")
    options.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the embeddings")
    options.add_argument("--unlocked", action="store_true", help="gradients for both sides")
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    figures = measure(args)
    print(figures)
    if args.json:
        args.json.write_text(json.dumps(figures | {"options": plain_options(args)}), encoding="utf-8")


def measure(args: argparse.Namespace, warm_up: int = _WARM_UP) -> dict[str, Any]:
    """Bytes added at the peak, and seconds, of the second of two runs; the first, of `warm_up` pairs, is small."""
    warm = Pairs.draw(min(args.n, warm_up), args.dim, args.dtype, args.unlocked, args.device)
    compiled = elementwise.compiling(args.n**2)
    # The compiler's own memory must not count, so it works on the small run already.
    with mock.patch.object(elementwise, "COMPILE_FROM", 0 if compiled else elementwise.COMPILE_FROM):
        contenders(warm)[args.contender]()
    del warm
    pairs = Pairs.draw(args.n, args.dim, args.dtype, args.unlocked, args.device)
    run = contenders(pairs)[args.contender]
    before, way = begin_peak(args.device)
    begun = time.perf_counter()
    run()
    after = peak(args.device)
    seconds = time.perf_counter() - begun
    added = max(0, after - before - pairs.gradient_bytes())
    return {"added_bytes": added, "seconds": seconds, "measured_by": way, "compiled": compiled}


def in_a_process(contender: str, n: int, args: argparse.Namespace, dtype: str, unlocked: bool) -> dict[str, Any]:
    """`measure` of one contender, with nothing else in its process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.json"
        words = ["--contender", contender, "--n", n, "--dim", args.dim, "--dtype", dtype, "--device", args.device]
        words += ["--threads", args.threads, "--json", path] + ["--unlocked"] * unlocked
        command = [sys.executable, "-m", "benchmarks.loss_memory", *map(str, words)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
        return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
