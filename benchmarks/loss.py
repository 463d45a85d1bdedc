"""The sigmoid loss, forward and backward, against open_clip and the bare matrix products: time, and peak memory.

    python -m benchmarks.loss --json loss.json
    python -m benchmarks.loss --table --n 0 --memory-n 0 --json table.json      # siglit alone, 4k … 1M pairs

Contenders take turns on the same pairs of random unit rows and are checked against each other first. Memory is measured
in a process of its own for each, see `loss_memory`.
"""

import argparse
import statistics
from typing import Any

import torch

from benchmarks.common import free_memory, interleaved, parser, plain_options, ratio, report
from benchmarks.loss_contenders import DTYPES, LIMITS, OURS, PEERS, RECOMPUTED, Pairs, contenders
from benchmarks.loss_memory import in_a_process
from siglit.loss import elementwise

MIB = 2**20
TARGET_MEMORY = 64  # MiB, target at n = 8,192
Rows = list[tuple[str, str, str]]


def main() -> None:
    """Time, memory, table; report."""
    options = parser(__doc__)
    options.add_argument("--n", type=int, default=8192, help="pairs; 0: no times and no memory at this n")
    options.add_argument("--dim", type=int, default=768, help="embedding width")
    options.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="of the embeddings")
    options.add_argument(
        "--unlocked",
        action=argparse.BooleanOptionalAction,
        help="gradients for both sides, or for the texts only; default: one after the other",
    )
    options.add_argument("--repeats", type=int, default=5, help="turns")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where")
    options.add_argument("--memory-n", type=int, default=32_768, help="pairs of the second memory table; 0: none")
    options.add_argument("--no-memory", action="store_true", help="measure no memory")
    options.add_argument("--table", action="store_true", help="also siglit alone at n = 4k, 8k … 1M")
    options.add_argument("--budget-seconds", type=float, default=120, help="--table ends before an n that takes longer")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {"options": plain_options(args), "seconds": {}, "ratios": {}, "memory": {}, "table": []}
    rows: Rows = []
    for unlocked in (False, True) if args.unlocked is None else (args.unlocked,):
        for dtype in args.dtype if args.n else ():
            rows += times(args, dtype, unlocked, figures)
        if not args.no_memory:
            rows += memory(args, unlocked, figures)
    if args.table:
        rows += table(args, figures)
    title = f"sigmoid loss, D = {args.dim}, {args.device}, {args.threads} threads, median of {args.repeats} turns"
    report(title, rows or [("nothing to measure", "", "")], figures, args.json)


def times(args: argparse.Namespace, dtype: str, unlocked: bool, figures: dict[str, Any]) -> Rows:
    """Return the seconds of each contender, and their ratios with targets."""
    pairs = Pairs.draw(args.n, args.dim, dtype, unlocked, args.device)
    runs = contenders(pairs)
    _agree(pairs, runs, dtype)
    waited = {name: (lambda run=run: _synchronized(run, args.device)) for name, run in runs.items()}
    seconds = interleaved(waited, args.repeats)
    name = f"n = {args.n:,}, {dtype}, {'both sides' if unlocked else 'locked'}"
    best = min((peer for peer in PEERS if peer in seconds), key=lambda peer: statistics.median(seconds[peer]))
    fastest = seconds[best]
    target = "≤ 0.8" if unlocked else "≤ 0.65"
    ratios = {
        f"siglit / fastest peer ({best})": (ratio(seconds["siglit"], fastest), target),
        f"siglit, eager / fastest peer ({best})": (ratio(seconds["siglit, eager"], fastest), "≤ 1"),
        "rate of siglit / of the products in tiles": (
            ratio(seconds[LIMITS[0]], seconds["siglit"]),
            "≥ 0.8" if dtype == "float32" else "",
        ),
        "rate of siglit / of the products at once": (ratio(seconds[LIMITS[1]], seconds["siglit"]), ""),
        f"siglit / {RECOMPUTED}": (ratio(seconds["siglit"], seconds[RECOMPUTED]), ""),
    }
    figures["seconds"][name] = {run: statistics.median(taken) for run, taken in seconds.items()}
    figures["ratios"][name] = {what: value for what, (value, _) in ratios.items()}
    compiled = "compiled" if elementwise.compiling(args.n**2) else "siglit is eager: n is small, or no compiler"
    rows = [(f"{name}: {what}", f"{value:.2f}", target) for what, (value, target) in ratios.items()]
    rows += [(f"{name}: {run}", f"{taken:.3f} s", "") for run, taken in figures["seconds"][name].items()]
    return [*rows, (f"{name}: siglit", compiled, "")]


def memory(args: argparse.Namespace, unlocked: bool, figures: dict[str, Any]) -> Rows:
    """Peak bytes beyond inputs and gradients at n and at the larger `--memory-n`, in the first of the types."""
    dtype, rows, small = args.dtype[0], [], {}
    names = [name for name in (*OURS, *PEERS, RECOMPUTED) if name in contenders(_one_pair(args))]
    for n in dict.fromkeys(n for n in (args.n, args.memory_n) if n):
        added: dict[str, float] = {}
        run: list[str] = []
        case = f"n = {n:,}, {dtype}, {'both sides' if unlocked else 'locked'}"
        head = f"{case}: memory of"
        for name in names:
            likely = _likely_bytes(name, n, small.get(name), args.n)
            free = free_memory(args.device)
            if likely > free / 2:
                added[name] = likely
                reason = f"not run: about {likely / MIB:,.0f} MiB, as its memory grows with n², {free / MIB:,.0f} free"
                rows.append((f"{head} {name}", reason, ""))
                continue
            result = in_a_process(name, n, args, dtype, unlocked)
            if "failed" in result:
                rows.append((f"{head} {name}", f"failed: {result['failed'][:80]}", ""))
                continue
            added[name] = result["added_bytes"]
            run.append(name)
            target = f"≤ {TARGET_MEMORY} MiB" if name == "siglit" and n == args.n else ""
            rows.append((f"{head} {name}", f"{added[name] / MIB:,.0f} MiB", target))
        small = small or added
        figures["memory"][case] = {"added_bytes": added, "measured": run}
        leanest = min((peer for peer in PEERS if added.get(peer)), key=added.__getitem__, default=None)
        if leanest and "siglit" in added:
            target = "≤ 0.1" if n == args.memory_n else ""
            of = leanest if leanest in run else f"{leanest}, which was not run"
            rows.append(
                (f"{head} siglit / of the leanest peer ({of})", f"{added['siglit'] / added[leanest]:.3f}", target)
            )
    return rows


def table(args: argparse.Namespace, figures: dict[str, Any]) -> Rows:
    """Time and peak memory of siglit at n = 4k, 8k … 1M, locked, until the next one would take too long."""
    rows: Rows = []
    seconds, n = 0.0, 4096
    while n <= 2**20:
        if 4 * seconds > args.budget_seconds:
            reason = f"not run: about {4 * seconds:,.0f} s, --budget-seconds is {args.budget_seconds:g}"
            return [*rows, (f"n = {n:,}: siglit alone", reason, "")]
        result = in_a_process("siglit", n, args, args.dtype[0], bool(args.unlocked))
        if "failed" in result:
            return [*rows, (f"n = {n:,}: siglit alone", f"failed: {result['failed'][:80]}", "")]
        seconds = result["seconds"]
        figures["table"].append({"n": n, **result})
        rows.append((f"n = {n:,}: siglit alone", f"{result['added_bytes'] / MIB:,.0f} MiB, {seconds:,.2f} s", ""))
        n *= 2
    return rows


def _likely_bytes(name: str, n: int, before: float | None, n_before: int) -> float:
    """How much a contender will need, from what it needed at another n; six squares of float32 if that is not known."""
    if name not in PEERS:
        return 0.0
    return 24.0 * n**2 if before is None else before * (n / n_before) ** 2


def difference(pairs: Pairs, runs: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """How far value and gradient of the texts are from siglit's, relatively, by contender."""
    value = runs["siglit"]().float()
    gradient = pairs.ztxt.grad.float()
    apart = {}
    for name, run in runs.items():
        if name in (*PEERS, RECOMPUTED, "siglit, eager"):
            other = run().float()
            of_gradient = (pairs.ztxt.grad.float() - gradient).norm() / gradient.norm()
            apart[name] = (((other - value).abs() / value.abs()).item(), of_gradient.item())
    return apart


def _agree(pairs: Pairs, runs: dict[str, Any], dtype: str) -> None:
    """Fail unless all contenders compute one value and one gradient of the texts."""
    tolerance = 1e-3 if dtype == "float32" else 5e-2
    for name, (value, gradient) in difference(pairs, runs).items():
        assert value < tolerance, f"{name}: its value is {value:.1e} apart"
        assert gradient < tolerance, f"{name}: its gradient is {gradient:.1e} apart"


def _one_pair(args: argparse.Namespace) -> Pairs:
    return Pairs.draw(1, 1, args.dtype[0], False, "cpu")


def _synchronized(run: Any, device: str) -> None:
    run()
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
