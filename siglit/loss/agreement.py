"""What ranks tell each other beside embeddings: a few integers, read at once or one step late.

Knows process groups, neither losses nor training. Shapes: W ranks.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from siglit.loss.exchange import gather_rows, start_gathering, wait


def disagreement(description: str, failed: bool, group: dist.ProcessGroup | None, device: torch.device) -> str | None:
    """Compare what all ranks are about to do, so that they fail together instead of waiting for each other.

    Args:
        description: everything that must be the same on every rank, as text; the problem if this rank has failed.
        failed: this rank cannot take part.
        group: the ranks.
        device: where the group's tensors live.

    Returns:
        None if all descriptions are equal and no rank has failed; else, on every rank, a message with all descriptions.
    """
    rows = gather_rows(torch.tensor([[_digest(description), failed]], device=device), group).tolist()
    if _equal_and_sound(rows):
        return None
    texts: list[str] = [""] * len(rows)
    dist.all_gather_object(texts, description, group=group)
    return "the ranks do not agree: " + "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))


class LateGather:
    """Gathers a few integers of every rank at each step, and nobody waits: those of a step are read in the next one.

    All ranks must call it equally often. On CUDA the host waits only where it is a whole step ahead of the device.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        """Take the ranks; None: all."""
        self._group = group
        self._read: Callable[[], list[list[int]]] | None = None

    def __call__(self, numbers: Sequence[int], device: torch.device) -> list[list[int]] | None:
        """Send this rank's numbers of this step.

        Args:
            numbers: equally many on all ranks.
            device: where the group's tensors live.

        Returns:
            W lists: the numbers of all ranks in the step before; None in the first step.
        """
        read, self._read = self._read, self._send(numbers, device)
        return None if read is None else read()

    def last(self) -> list[list[int]] | None:
        """Wait for the numbers of the newest step; the next step is then a first one. None if there is no step."""
        read, self._read = self._read, None
        return None if read is None else read()

    def _send(self, numbers: Sequence[int], device: torch.device) -> Callable[[], list[list[int]]]:
        """Start gathering; return what waits for the gathered numbers and reads them."""
        if device.type != "cuda":
            gathered, works = start_gathering(torch.tensor([[*numbers]], device=device), self._group)

            def read_when_gathered() -> list[list[int]]:
                wait(works)
                return gathered.tolist()

            return read_when_gathered
        # Copies from and to pinned memory are enqueued like kernels; any other would wait for the device.
        sent = torch.tensor([[*numbers]], pin_memory=True).to(device, non_blocking=True)
        gathered = gather_rows(sent, self._group)
        arrived = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=True)
        arrived.copy_(gathered, non_blocking=True)
        event = torch.cuda.current_stream(device).record_event()

        def read_when_copied() -> list[list[int]]:
            event.synchronize()
            return arrived.tolist()

        return read_when_copied


class Agreement:
    """`disagreement` for a loop that calls the loss at each step: only the first call waits for the comparison.

    In each later call every rank sends what it is about to do and compares what all ranks sent in the call before. A
    rank cannot skip this where its own batch is as before, because that of another rank may not be.
    """

    def __init__(self) -> None:
        """Wait for the first call."""
        self._gather: LateGather | None = None
        self._description = ""

    def __call__(
        self, description: str, failed: bool, group: dist.ProcessGroup | None, device: torch.device
    ) -> str | None:
        """Take what `disagreement` takes; return a message if the ranks differ, or differed in the call before."""
        if self._gather is None:
            self._gather = LateGather(group)
            return disagreement(description, failed, group, device)
        before = self._problem(self._gather([_digest(description), failed], device))
        self._description = description
        return description if failed else before

    def last(self) -> str | None:
        """Wait for the newest call's comparison, before its result is relied on; a message if the ranks differed."""
        return None if self._gather is None else self._problem(self._gather.last())

    def _problem(self, rows: list[list[int]] | None) -> str | None:
        if rows is None or _equal_and_sound(rows):
            return None
        digests = [row[0] for row in rows]
        unlike = [str(rank) for rank, row in enumerate(rows) if row != [digests[0], 0]]
        return (
            f"the ranks did not agree in the last step: rank {', '.join(unlike)} differed from rank 0; "
            f"this rank: {self._description}"
        )


def _equal_and_sound(rows: list[list[int]]) -> bool:
    """Whether all ranks sent the same digest and none has failed."""
    return all(row == [rows[0][0], 0] for row in rows)


def _digest(description: str) -> int:
    return int.from_bytes(hashlib.sha256(description.encode()).digest()[:7], "big")
