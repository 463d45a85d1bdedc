"""The sigmoid loss of arXiv:2303.15343, equation 1, over all pairs of a global batch.

Knows nothing of towers, caches or Lightning. Shapes: B pairs per rank, W ranks, D embedding width.
"""

import torch
import torch.distributed as dist
from torch.nn import functional as F

from siglit.loss.exchange import gather_rows, world


def sigmoid_loss(
    zimg: torch.Tensor,
    ztxt: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Mean over this rank's texts of the summed loss against every image of the global batch.

    `-(1/B) sum_i sum_j log sigmoid(z_ij (t x_i·y_j + b))`, z = +1 for the pair's own image and −1 otherwise. The
    frozen image side is gathered and gets no gradient; the mean of the ranks' losses, which DDP takes of their
    gradients, is then exactly the global loss, without a correction by W. Logits and sums are float32 (or wider)
    whatever autocast says.

    Args:
        zimg: (B, D) unit rows, locked: no gradient flows to them.
        ztxt: (B, D) unit rows, paired with `zimg` row by row.
        logit_scale: scalar t > 0.
        logit_bias: scalar b.
        group: ranks that share the global batch; None: all ranks, or this process alone.

    Returns:
        Scalar loss of this rank.

    Raises:
        ValueError: the two sides differ in shape, or the batch is empty.
    """
    if zimg.shape != ztxt.shape or zimg.ndim != 2 or len(zimg) == 0:
        raise ValueError(
            f"the loss needs two (B, D) tensors of one shape, got {tuple(zimg.shape)} and {tuple(ztxt.shape)}"
        )
    batch, (_, rank) = len(ztxt), world(group)
    zimg = gather_rows(zimg, group)
    with torch.autocast(ztxt.device.type, enabled=False):
        wide = torch.promote_types(ztxt.dtype, torch.float32)
        logits = ztxt.to(wide) @ zimg.to(wide).T * logit_scale + logit_bias
        own = torch.arange(batch, device=logits.device)
        positive = logits[own, own + rank * batch]
        # -log sigmoid(-x) for all, then the diagonal's sign is put right: log sigmoid(x) - log sigmoid(-x) = x.
        return (F.softplus(logits).sum() - positive.sum()) / batch
