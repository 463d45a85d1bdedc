"""How ranks share embeddings: every rank receives every other rank's block and returns a gradient for it.

Knows process groups, not losses. Nothing here is differentiable: the losses compute the gradients of a block while they
have it and return them at once, so that backward has nothing to communicate.
Shapes: B rows per rank, W ranks, D columns.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist

Exchange = Literal["bidir", "shift", "reduce", "gather"]
EXCHANGES: tuple[str, ...] = get_args(Exchange)


def blocks_held(exchange: Exchange | None, ranks: int) -> tuple[int, int]:
    """Most blocks of B rows that a rank holds during an exchange.

    Args:
        exchange: how blocks travel; None: not at all.
        ranks: W.

    Returns:
        Blocks of rows besides the local one; blocks of gradients, if gradients are returned.
    """
    if exchange is None or ranks == 1:
        return 0, 1
    if exchange == "gather":
        return ranks, ranks + 1
    # Round the ring: the sum, the one being sent, the one being received, and from the third rank on the current one.
    return (4 if exchange == "bidir" else 2), 3 if exchange == "reduce" or ranks == 2 else 4


def world(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Return (W, rank of this process); (1, 0) where no process group is set up."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    return dist.get_world_size(group), dist.get_rank(group)


def gather_rows(rows: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Collect the (B, …) rows of all ranks as (W · B, …), in the order of the ranks; no gradient flows back."""
    gathered, works = start_gathering(rows, group)
    wait(works)
    return gathered


def start_gathering(rows: torch.Tensor, group: dist.ProcessGroup | None = None) -> tuple[torch.Tensor, list[dist.Work]]:
    """Start `gather_rows`; return its result, to be read after a `wait`, and what to wait for."""
    ranks, _ = world(group)
    rows = rows.detach().contiguous()
    if ranks == 1:
        return rows, []
    gathered = rows.new_empty(ranks * len(rows), *rows.shape[1:])
    # torch 2.14 renamed this function and warns about the old name, the only one that earlier versions have.
    all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    work = all_gather(gathered, rows, group=group, async_op=True)
    assert work is not None
    return gathered, [work]


def wait(works: Sequence[dist.Work]) -> None:
    """Wait for communication; on CUDA the current stream waits, not the host."""
    for work in works:
        work.wait()


class BlockExchange:
    """Brings the blocks of all ranks to this one and returns their gradients; around the ring, its own comes first.

    Iterate to get (rank that owns the block, tensors of the block). Call `return_grad` with the gradient that this rank
    computed for a block before taking the next one; after the last one, `local_grad` holds the sum of the gradients
    that all ranks computed for this rank's block. All ranks must make the same calls. The next block is on its way
    while the current one is worked on, the first one included.

    | exchange | a block travels | rounds | rows held besides the local block |
    |---|---|---|---|
    | bidir | both ways round the ring, half way each | W / 2 | 4 B |
    | shift | once round the ring | W − 1 | 2 B |
    | reduce | by a broadcast from its owner; its gradient returns by a reduction | W | 2 B |
    | gather | to all at once; its gradient returns by a reduce-scatter | 1 | W B |

    A rank sends (W − 1) B rows and as many rows of gradients. Around the ring, a gradient goes straight to the owner
    instead of along with the block: this takes as many bytes and leaves no rank waiting for another rank's sum.

    Attributes:
        local_grad: None where no gradients were returned.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        exchange: Exchange | None = "bidir",
        group: dist.ProcessGroup | None = None,
    ):
        """Prepare the exchange.

        Args:
            tensors: the local block: (B, …) each, of equal shapes on all ranks.
            exchange: how blocks travel; None: the local block is the only one.
            group: the ranks.
        """
        self._local = [tensor.detach().contiguous() for tensor in tensors]
        self._exchange, self._group = exchange, group
        self._ranks, self._rank = world(group) if exchange else (1, 0)
        self.local_grad: torch.Tensor | None = None
        self._block_grads: dict[int, torch.Tensor] = {}
        # The return in flight: its requests, the tensor it arrives in, and the tensor that must live until it is sent.
        self._in_flight: tuple[list[dist.Work], torch.Tensor | None, torch.Tensor] | None = None
        self._owner = -1

    def __iter__(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Yield (owner's rank, tensors) W times."""
        if self._ranks == 1:
            blocks = iter([(self._rank, self._local)])
        elif self._exchange in ("bidir", "shift"):
            blocks = self._around_the_ring()
        else:
            blocks = self._broadcasts() if self._exchange == "reduce" else self._gathered()
        for self._owner, tensors in blocks:
            yield self._owner, tensors
        self._finish()

    def return_grad(self, block_grad: torch.Tensor) -> None:
        """Send the gradient of the current block to its owner; the tensor must not be changed afterwards."""
        if self._ranks == 1:
            self.local_grad = block_grad
        elif self._exchange == "gather":
            self._block_grads[self._owner] = block_grad
        elif self._exchange == "reduce":
            self._wait_for_return()
            work = dist.reduce(block_grad, self._global_rank(self._owner), group=self._group, async_op=True)
            assert work is not None
            self._in_flight = [work], block_grad if self._owner == self._rank else None, block_grad
        elif self._owner == self._rank:
            self.local_grad = block_grad
        else:
            self._wait_for_return()
            # All blocks have travelled equally far: if this one came k ranks, the local one is k ranks further on.
            sender = (2 * self._rank - self._owner) % self._ranks
            received = torch.empty_like(block_grad)
            ops = self._send_and_receive([block_grad], self._owner, [received], sender, tag=1)
            self._in_flight = dist.batch_isend_irecv(ops), received, block_grad

    def _around_the_ring(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        to_left = (self._ranks - 1) // 2 if self._exchange == "bidir" else 0
        steps = {1: self._ranks - 1 - to_left, -1: to_left}
        arriving = self._pass_on({direction: self._local for direction in steps if steps[direction]})
        yield self._rank, self._local
        for step in range(1, steps[1] + 1):
            works, current = arriving
            wait(works)
            arriving = self._pass_on(
                {direction: tensors for direction, tensors in current.items() if step < steps[direction]}
            )
            for direction, tensors in current.items():
                yield (self._rank - direction * step) % self._ranks, tensors

    def _pass_on(self, current: dict[int, list[torch.Tensor]]) -> tuple[list[dist.Work], dict[int, list[torch.Tensor]]]:
        """Send blocks on, to the right (direction 1) and to the left (−1), and receive those that travel likewise."""
        arriving = {direction: [torch.empty_like(tensor) for tensor in self._local] for direction in current}
        ops = []
        for direction, tensors in current.items():
            ops += self._send_and_receive(
                tensors,
                (self._rank + direction) % self._ranks,
                arriving[direction],
                (self._rank - direction) % self._ranks,
            )
        return dist.batch_isend_irecv(ops) if len(ops) > 0 else [], arriving

    def _broadcasts(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        arriving = self._broadcast(0)
        for owner in range(self._ranks):
            works, tensors = arriving
            wait(works)
            if owner + 1 < self._ranks:
                arriving = self._broadcast(owner + 1)
            yield owner, tensors

    def _broadcast(self, owner: int) -> tuple[list[dist.Work], list[torch.Tensor]]:
        tensors = self._local if owner == self._rank else [torch.empty_like(tensor) for tensor in self._local]
        works = [dist.broadcast(t, self._global_rank(owner), group=self._group, async_op=True) for t in tensors]
        return [work for work in works if work is not None], tensors

    def _gathered(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        arriving = [start_gathering(tensor, self._group) for tensor in self._local]
        yield self._rank, self._local
        for _, works in arriving:
            wait(works)
        gathered = [tensor.unflatten(0, (self._ranks, -1)) for tensor, _ in arriving]
        for step in range(1, self._ranks):
            owner = (self._rank + step) % self._ranks
            yield owner, [tensor[owner] for tensor in gathered]

    def _finish(self) -> None:
        self._wait_for_return()
        if len(self._block_grads) > 0:
            by_owner = [self._block_grads[owner] for owner in range(self._ranks)]
            self.local_grad = torch.empty_like(by_owner[0])
            dist.reduce_scatter(self.local_grad, by_owner, group=self._group)
            self._block_grads = {}

    def _wait_for_return(self) -> None:
        if self._in_flight is None:
            return
        works, arrived, _ = self._in_flight
        wait(works)
        if arrived is not None:
            self.local_grad = arrived if self.local_grad is None else self.local_grad.add_(arrived)
        self._in_flight = None

    def _send_and_receive(
        self, sent: Sequence[torch.Tensor], to: int, received: Sequence[torch.Tensor], source: int, tag: int = 0
    ) -> list[dist.P2POp]:
        sends = [dist.P2POp(dist.isend, tensor, self._global_rank(to), self._group, tag) for tensor in sent]
        return sends + [
            dist.P2POp(dist.irecv, tensor, self._global_rank(source), self._group, tag) for tensor in received
        ]

    def _global_rank(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)
