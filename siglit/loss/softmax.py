"""The softmax loss (InfoNCE, as CLIP and LiT use it) over a global batch, for comparison with the sigmoid loss.

The gradient in a pair's logit depends on the sums of its row and its column, so the blocks are exchanged twice: once
for the sums, once for the gradients. Knows nothing of towers or caches.
Shapes: B pairs per rank, W ranks, D embedding width, r × c texts × images of a tile.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from siglit.loss.agreement import Agreement
from siglit.loss.elementwise import compiling, fused, softmax_grad_logits
from siglit.loss.exchange import BlockExchange, Exchange, world
from siglit.loss.function import LossWithGradients, check, graph_break, scalar
from siglit.loss.tiles import add_product, cosines, grad_logits_dtype, tiles, wide


@graph_break
def softmax_loss(
    zimg: torch.Tensor,
    ztxt: torch.Tensor,
    logit_scale: torch.Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange | None = "bidir",
    chunk_size: int | None = None,
    agreement: Agreement | None = None,
) -> torch.Tensor:
    """Mean over this rank's pairs of the cross-entropies of its text among all images and of its image among all texts.

    `-(1/2B) sum_i (log softmax_j(t x_i·y_j) + log softmax_j(t x_j·y_i))[i]`. Memory, types, exchanges and gradients are
    as in `sigmoid_loss`; in addition, each rank holds a scalar for each image of the global batch.

    Args:
        zimg: (B, D) unit rows; float32, float64, bfloat16 or float16.
        ztxt: (B, D) unit rows of the same type, paired with `zimg` row by row.
        logit_scale: scalar t > 0.
        group: ranks that share the global batch; None: all ranks, or this process alone.
        exchange: how images travel, see `BlockExchange`; None: the loss of this process alone.
        chunk_size: pairs are computed in tiles of chunk_size × chunk_size; None: chosen for the device.
        agreement: as of `sigmoid_loss`.

    Returns:
        Scalar loss of this rank, float32 or wider. The mean over the ranks' losses is the loss of the global batch, and
        so is the mean over their gradients.

    Raises:
        ValueError: as `sigmoid_loss`.

    Source: open_clip `ClipLoss` with local_loss=True; equal on its inputs.
    """
    grad = torch.is_grad_enabled()
    image_gradient, text_gradient = grad and zimg.requires_grad, grad and ztxt.requires_grad
    scale = scalar(logit_scale, ztxt)
    check(
        zimg,
        ztxt,
        group=group,
        exchange=exchange,
        chunk_size=chunk_size,
        agreement=agreement,
        agreed=("softmax", image_gradient),
    )
    any_gradient = image_gradient or text_gradient or (grad and scale.requires_grad)
    compute = _SoftmaxLoss(group, exchange, chunk_size, image_gradient, text_gradient, any_gradient)
    loss: torch.Tensor = LossWithGradients.apply(compute, zimg, ztxt, scale)
    return loss


@dataclass(frozen=True)
class _SoftmaxLoss:
    """The options of a call, and its computation."""

    group: dist.ProcessGroup | None
    exchange: Exchange | None
    chunk_size: int | None
    image_gradient: bool
    text_gradient: bool
    any_gradient: bool

    def __call__(self, zimg: torch.Tensor, ztxt: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the loss and its gradients in images, texts and scale."""
        dtype = wide(ztxt.dtype)
        scale = scale.to(dtype).reshape(())
        row_log_sums, column_log_sums = self._log_sums(zimg, ztxt, scale)
        own_cos = (ztxt.to(dtype) * zimg.to(dtype)).sum(1)
        loss = (row_log_sums + column_log_sums - 2 * own_cos * scale).sum() / (2 * len(ztxt))
        if not self.any_gradient:
            return loss, None, None, None
        grad_ztxt = torch.zeros_like(ztxt, dtype=dtype) if self.text_gradient else None
        grad_scale = ztxt.new_zeros(len(ztxt), dtype=dtype)
        ranks, rank = self._world
        exchange = BlockExchange([zimg, column_log_sums], self.exchange, self.group)
        pairs = len(ztxt) ** 2 * ranks
        elementwise = fused(softmax_grad_logits, pairs)
        for owner, (block, block_log_sums) in exchange:
            block_grad = torch.zeros_like(block, dtype=dtype) if self.image_gradient else None
            for rows, columns in tiles(len(ztxt), len(block), self.chunk_size, block.device, compiling(pairs)):
                cos = cosines(ztxt[rows], block[columns])
                grad_logits, sums = elementwise(
                    cos, scale, row_log_sums[rows], block_log_sums[columns], grad_logits_dtype(ztxt.dtype)
                )
                grad_scale[rows] += sums
                if owner == rank:
                    _set_positives(grad_logits, cos, scale, rows, columns, row_log_sums, column_log_sums)
                if grad_ztxt is not None:
                    add_product(grad_ztxt[rows], grad_logits, block[columns])
                if block_grad is not None:
                    add_product(block_grad[columns], grad_logits.T, ztxt[rows])
                del cos, grad_logits
            if block_grad is not None:
                exchange.return_grad(block_grad)
        grad_scale -= 2 * own_cos
        for gradient in (exchange.local_grad, grad_ztxt):
            if gradient is not None:
                gradient.mul_(scale / (2 * len(ztxt)))
        return loss, exchange.local_grad, grad_ztxt, grad_scale.sum() / (2 * len(ztxt))

    @property
    def _world(self) -> tuple[int, int]:
        return world(self.group) if self.exchange else (1, 0)

    def _log_sums(
        self, zimg: torch.Tensor, ztxt: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log of the sum of exp(logit) over the global batch.

        Returns:
            (B,) of each local text over all images; (B,) of each local image over all texts.
        """
        ranks, _ = self._world
        row_log_sums = ztxt.new_full((len(ztxt),), -torch.inf, dtype=scale.dtype)
        column_log_sums = row_log_sums.new_full((ranks, len(ztxt)), -torch.inf)
        for owner, (block,) in BlockExchange([zimg], self.exchange, self.group):
            for rows, columns in tiles(len(ztxt), len(block), self.chunk_size, block.device):
                logits = cosines(ztxt[rows], block[columns]) * scale
                row_log_sums[rows] = torch.logaddexp(row_log_sums[rows], logits.logsumexp(1))
                column_log_sums[owner, columns] = torch.logaddexp(column_log_sums[owner, columns], logits.logsumexp(0))
        if ranks > 1:
            from_all = torch.empty_like(column_log_sums)
            dist.all_to_all_single(from_all, column_log_sums, group=self.group)
            column_log_sums = from_all
        return row_log_sums, column_log_sums.logsumexp(0)


def _set_positives(
    grad_logits: torch.Tensor,
    cos: torch.Tensor,
    scale: torch.Tensor,
    rows: slice,
    columns: slice,
    row_log_sums: torch.Tensor,
    column_log_sums: torch.Tensor,
) -> None:
    """Set a local tile's positives in grad_logits: the sum of their two probabilities − 2, before any is rounded.

    In bfloat16 a probability of 0.999 is 1, and the gradient would be 0.
    """
    top, bottom = max(rows.start, columns.start), min(rows.stop, columns.stop)
    if top >= bottom:
        return
    inside = slice(top - rows.start, bottom - rows.start), slice(top - columns.start, bottom - columns.start)
    logits = cos[inside].diagonal() * scale
    grad = torch.expm1(logits - row_log_sums[top:bottom]) + torch.expm1(logits - column_log_sums[top:bottom])
    grad_logits[inside].diagonal().copy_(grad)
