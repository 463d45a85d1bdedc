"""How ranks share embeddings: the block of every rank is brought past every other one, and what it earns goes home.

Knows process groups, not losses. Nothing here is differentiable: the losses compute gradients as the blocks come by and
send those home too, so that backward has nothing to communicate.
Shapes: B rows per rank, W ranks, D columns.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist

Exchange = Literal["bidir", "shift", "reduce", "gather"]
EXCHANGES: tuple[str, ...] = get_args(Exchange)


def world(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Return (W, this rank's number); (1, 0) where no process group is set up."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    return dist.get_world_size(group), dist.get_rank(group)


def disagreement(mine: str, wrong: bool, group: dist.ProcessGroup | None, device: torch.device) -> str | None:
    """Compare what all ranks are about to do, so that they fail together instead of waiting for each other.

    Args:
        mine: all that must be the same on every rank, in words.
        wrong: this rank cannot go on, and `mine` says why.
        group: the ranks.
        device: where the group's tensors live.

    Returns:
        None if all ranks say the same and none is wrong; else, on all of them, what each said.
    """
    digest = int.from_bytes(hashlib.sha256(mine.encode()).digest()[:7], "big")
    told = gather_rows(torch.tensor([[digest, wrong]], device=device), group)
    if not bool((told != told.new_tensor([digest, 0])).any()):
        return None
    texts: list[str] = [""] * len(told)
    dist.all_gather_object(texts, mine, group=group)
    return "the ranks do not agree: " + "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))


def gather_rows(rows: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Collect the (B, …) rows of all ranks as (W · B, …), in the order of the ranks; no gradient flows back."""
    ranks, _ = world(group)
    rows = rows.detach().contiguous()
    if ranks == 1:
        return rows
    gathered = rows.new_empty(ranks * len(rows), *rows.shape[1:])
    # torch 2.14 renamed it and warns of the old name, which is all that earlier versions have.
    all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    all_gather(gathered, rows, group=group)
    return gathered


class BlockExchange:
    """The visits of all ranks' blocks to this one; around the ring, its own comes first.

    Iterate to get (rank it belongs to, tensors of the block); call `give` with what the block has earned before the
    next one is taken; `collected` then holds the sum of what all ranks gave to this rank's block. All ranks must do the
    same. The next block is on its way while the present one is worked on.

    | exchange | a block travels | rounds | rows held besides one's own |
    |---|---|---|---|
    | bidir | both ways round the ring, half way each | W / 2 | 4 B |
    | shift | once round the ring | W − 1 | 2 B |
    | reduce | by a broadcast from its rank, and home by a reduction | W | 2 B |
    | gather | to all at once, and home by a reduce-scatter | 1 | W B |

    A rank sends (W − 1) B rows and as many rows home; around the ring, earnings go straight home instead of along with
    the block, which takes as many bytes and leaves no rank waiting for another's sum.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        exchange: Exchange | None = "bidir",
        group: dist.ProcessGroup | None = None,
    ):
        """Take this rank's block: tensors of equal shapes on all ranks; with no exchange, it is the only one."""
        self._mine = [tensor.detach().contiguous() for tensor in tensors]
        self._exchange, self._group = exchange, group
        self._ranks, self._rank = world(group) if exchange else (1, 0)
        self.collected: torch.Tensor | None = None
        self._earned: list[torch.Tensor] = []
        # Of the reply under way: its requests, where it arrives, and what must live until it has left.
        self._reply: tuple[list[dist.Work], torch.Tensor | None, torch.Tensor] | None = None
        self._origin = -1

    def __iter__(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Yield (rank, tensors) W times."""
        if self._ranks == 1:
            blocks = iter([(self._rank, self._mine)])
        elif self._exchange in ("bidir", "shift"):
            blocks = self._around_the_ring()
        else:
            blocks = self._broadcasts() if self._exchange == "reduce" else self._gathered()
        for self._origin, tensors in blocks:
            yield self._origin, tensors
        self._finish()

    def give(self, earned: torch.Tensor) -> None:
        """Send home what the block that is here has earned; the tensor must not be changed afterwards."""
        if self._ranks == 1:
            self.collected = earned
        elif self._exchange == "gather":
            self._earned.append(earned)
        elif self._exchange == "reduce":
            self._wait_for_reply()
            work = dist.reduce(earned, self._global(self._origin), group=self._group, async_op=True)
            assert work is not None
            self._reply = [work], earned if self._origin == self._rank else None, earned
        elif self._origin == self._rank:
            self.collected = earned
        else:
            self._wait_for_reply()
            # Whoever is as far from me as I am from the block's home works on mine now.
            worker = (2 * self._rank - self._origin) % self._ranks
            arriving = torch.empty_like(earned)
            ops = self._swap([earned], self._origin, [arriving], worker, tag=1)
            self._reply = dist.batch_isend_irecv(ops), arriving, earned

    def _around_the_ring(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        to_left = (self._ranks - 1) // 2 if self._exchange == "bidir" else 0
        steps = {1: self._ranks - 1 - to_left, -1: to_left}
        yield self._rank, self._mine
        here = {way: self._mine for way in steps if steps[way]}
        coming = self._pass_on(here)
        for step in range(1, steps[1] + 1):
            works, here = coming
            _wait(works)
            coming = self._pass_on({way: tensors for way, tensors in here.items() if step < steps[way]})
            for way, tensors in here.items():
                yield (self._rank - way * step) % self._ranks, tensors

    def _pass_on(self, here: dict[int, list[torch.Tensor]]) -> tuple[list[dist.Work], dict[int, list[torch.Tensor]]]:
        """Send blocks on to the right (way 1) and to the left (−1) and receive those that come the same ways."""
        coming = {way: [torch.empty_like(tensor) for tensor in self._mine] for way in here}
        ops = []
        for way, tensors in here.items():
            ops += self._swap(tensors, (self._rank + way) % self._ranks, coming[way], (self._rank - way) % self._ranks)
        return dist.batch_isend_irecv(ops) if ops else [], coming

    def _broadcasts(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        coming = self._broadcast(0)
        for origin in range(self._ranks):
            works, tensors = coming
            _wait(works)
            if origin + 1 < self._ranks:
                coming = self._broadcast(origin + 1)
            yield origin, tensors

    def _broadcast(self, origin: int) -> tuple[list[dist.Work], list[torch.Tensor]]:
        tensors = self._mine if origin == self._rank else [torch.empty_like(tensor) for tensor in self._mine]
        works = [dist.broadcast(t, self._global(origin), group=self._group, async_op=True) for t in tensors]
        return [work for work in works if work is not None], tensors

    def _gathered(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        gathered = [gather_rows(tensor, self._group).unflatten(0, (self._ranks, -1)) for tensor in self._mine]
        for origin in range(self._ranks):
            yield origin, [tensor[origin] for tensor in gathered]

    def _finish(self) -> None:
        self._wait_for_reply()
        if self._earned:
            self.collected = torch.empty_like(self._earned[0])
            dist.reduce_scatter(self.collected, self._earned, group=self._group)
            self._earned = []

    def _wait_for_reply(self) -> None:
        if self._reply is None:
            return
        works, arrived, _ = self._reply
        _wait(works)
        if arrived is not None:
            self.collected = arrived if self.collected is None else self.collected.add_(arrived)
        self._reply = None

    def _swap(
        self, out: Sequence[torch.Tensor], to: int, into: Sequence[torch.Tensor], of: int, tag: int = 0
    ) -> list[dist.P2POp]:
        sends = [dist.P2POp(dist.isend, tensor, self._global(to), self._group, tag) for tensor in out]
        return sends + [dist.P2POp(dist.irecv, tensor, self._global(of), self._group, tag) for tensor in into]

    def _global(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()
