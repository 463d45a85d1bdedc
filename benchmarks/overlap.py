"""How much of a slow link's time the exchange hides behind the products of the block before.

    python -m benchmarks.overlap --ranks 2 --json overlap.json

The ranks are processes of this machine (gloo). The link is simulated: what one rank passes on counts as arrived only
after as long as one block of the loss takes to compute. Without overlap, a step takes that much longer for each round.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from benchmarks.common import interleaved, parser, plain_options, report
from siglit.loss import sigmoid_loss
from siglit.loss.agreement import Agreement

ROUNDS = {"shift": lambda ranks: ranks - 1, "bidir": lambda ranks: ranks // 2}
"""Times that a rank passes blocks on, by exchange."""


class _Delayed:
    """A transfer that nobody sees arrive before its time."""

    def __init__(self, work: dist.Work, due: float):
        self._work, self._due = work, due

    def wait(self) -> None:
        time.sleep(max(0.0, self._due - time.perf_counter()))
        self._work.wait()


def main() -> None:
    """Start the ranks; the first one's figures are printed."""
    options = parser(__doc__)
    options.add_argument("--ranks", type=int, default=2, help="processes")
    options.add_argument("--n", type=int, default=2048, help="pairs per rank")
    options.add_argument("--dim", type=int, default=512, help="embedding width")
    options.add_argument("--repeats", type=int, default=7, help="turns")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (args, f"file://{folder}/store", f"{folder}/figures.pt"), nprocs=args.ranks)
        figures = torch.load(f"{folder}/figures.pt", weights_only=True)
    rows = [
        (
            f"{exchange}, {args.ranks} ranks",
            f"{f['hidden']:.0%} of {f['rounds']} × {f['link'] * 1e3:.0f} ms hidden"
            f" ({f['fast'] * 1e3:.0f} ms at once, {f['slow'] * 1e3:.0f} ms with the link)",
            "",
        )
        for exchange, f in figures.items()
    ]
    report("the exchange behind the products", rows, {"figures": figures, "options": plain_options(args)}, args.json)


def _rank(rank: int, args: argparse.Namespace, store: str, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.ranks)
    torch.manual_seed(rank)
    zimg, ztxt = (F.normalize(torch.randn(args.n, args.dim)) for _ in range(2))
    ztxt.requires_grad_()
    figures = {exchange: _measure(zimg, ztxt, exchange, args) for exchange in ROUNDS}
    if rank == 0:
        torch.save(figures, path)
    dist.destroy_process_group()


def _measure(zimg: torch.Tensor, ztxt: torch.Tensor, exchange: str, args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of one value with its gradients, with and without the link, and the share of it that is hidden."""
    agreement, real, link = Agreement(), dist.batch_isend_irecv, 0.0

    def send(ops: list[dist.P2POp]) -> list[Any]:
        due = time.perf_counter() + link
        return [_Delayed(work, due) for work in real(ops)]

    def step(seconds: float) -> None:
        nonlocal link
        link = seconds
        with mock.patch.object(dist, "batch_isend_irecv", send):
            sigmoid_loss(zimg, ztxt, 10.0, -10.0, exchange=exchange, agreement=agreement)

    alone = interleaved({"step": lambda: step(0.0)}, 3, before=dist.barrier)["step"]
    of_block = torch.tensor(statistics.median(alone) / args.ranks)
    dist.broadcast(of_block, 0)
    seconds = interleaved(
        {"fast": lambda: step(0.0), "slow": lambda: step(float(of_block))}, args.repeats, before=dist.barrier
    )
    rounds = ROUNDS[exchange](args.ranks)
    added = statistics.median(slow - fast for fast, slow in zip(seconds["fast"], seconds["slow"], strict=True))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {**medians, "link": float(of_block), "rounds": rounds, "hidden": 1 - added / (rounds * float(of_block))}


if __name__ == "__main__":
    main()
