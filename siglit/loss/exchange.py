"""How ranks share embeddings.

Knows process groups, not losses. Shapes: B rows per rank, W ranks, D columns.
"""

import torch
import torch.distributed as dist


def world(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Return (W, this rank's number); (1, 0) where no process group is set up."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    return dist.get_world_size(group), dist.get_rank(group)


def gather_rows(rows: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Collect the (B, D) rows of all ranks as (W · B, D), in the order of the ranks; no gradient flows back."""
    ranks, _ = world(group)
    rows = rows.detach().contiguous()
    if ranks == 1:
        return rows
    blocks = [torch.empty_like(rows) for _ in range(ranks)]
    dist.all_gather(blocks, rows, group=group)
    return torch.cat(blocks)
