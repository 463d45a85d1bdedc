"""The softmax loss (InfoNCE, as CLIP and LiT use it) over a global batch, for comparison with the sigmoid loss.

A pair's slope depends on the sums of its row and its column, so the blocks come by twice: once for the sums, once for
the gradients. Knows nothing of towers or caches. Shapes: B pairs per rank, W ranks, D embedding width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from siglit.loss.elementwise import compiling, fused, softmax_slope
from siglit.loss.exchange import BlockExchange, Exchange, world
from siglit.loss.function import LossWithGradients, check, scalar
from siglit.loss.tiles import add_product, cosines, slope_dtype, tiles, wide


@torch.compiler.disable
def softmax_loss(
    zimg: torch.Tensor,
    ztxt: torch.Tensor,
    logit_scale: torch.Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange | None = "bidir",
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Mean over this rank's pairs of the cross-entropies of its text among all images and of its image among all texts.

    `-(1/2B) sum_i (log softmax_j(t x_i·y_j) + log softmax_j(t x_j·y_i))[i]`. Memory, types, exchanges and gradients are
    as in `sigmoid_loss`; besides, each rank holds a scalar for each image of the global batch.

    Args:
        zimg: (B, D) unit rows; float32, float64, bfloat16 or float16.
        ztxt: (B, D) unit rows of the same type, paired with `zimg` row by row.
        logit_scale: scalar t > 0.
        group: ranks that share the global batch; None: all ranks, or this process alone.
        exchange: how images travel, see `BlockExchange`; None: the loss of this process alone.
        chunk_size: pairs are worked on in tiles of chunk_size × chunk_size; None: chosen for the device.

    Returns:
        Scalar loss of this rank, float32 or wider. The mean of the ranks' losses, and of their gradients, is the global
        batch's.

    Raises:
        ValueError: as `sigmoid_loss`.

    Source: open_clip `ClipLoss` with local_loss=True; equal on its inputs.
    """
    grad = torch.is_grad_enabled()
    wanted = grad and ztxt.requires_grad, grad and zimg.requires_grad
    scale = scalar(logit_scale, ztxt)
    check(zimg, ztxt, group=group, exchange=exchange, chunk_size=chunk_size, agreed=("softmax", wanted[1]))
    call = _Call(group, exchange, chunk_size, *wanted, any_gradient=any(wanted) or (grad and scale.requires_grad))
    loss: torch.Tensor = LossWithGradients.apply(call, ztxt, zimg, scale)
    return loss


@dataclass(frozen=True)
class _Call:
    """How a call is to be computed, and its computation."""

    group: dist.ProcessGroup | None
    exchange: Exchange | None
    chunk_size: int | None
    own_gradient: bool
    visiting_gradient: bool
    any_gradient: bool

    def __call__(
        self, own: torch.Tensor, visiting: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Loss, and its gradients in own rows (texts), visiting rows (images) and scale."""
        dtype = wide(own.dtype)
        scale = scale.to(dtype).reshape(())
        of_rows, of_columns = self._log_sums(own, visiting, scale)
        together = (own.to(dtype) * visiting.to(dtype)).sum(1)
        loss = (of_rows + of_columns - 2 * together * scale).sum() / (2 * len(own))
        if not self.any_gradient:
            return loss, None, None, None
        own_gradient = torch.zeros_like(own, dtype=dtype) if self.own_gradient else None
        in_scale = own.new_zeros(len(own), dtype=dtype)
        ranks, rank = self._world
        visits = BlockExchange([visiting, of_columns], self.exchange, self.group)
        pairs = len(own) ** 2 * ranks
        slopes = fused(softmax_slope, pairs)
        for origin, (block, of_block) in visits:
            earned = torch.zeros_like(block, dtype=dtype) if self.visiting_gradient else None
            for rows, columns in tiles(len(own), len(block), self.chunk_size, block.device, compiling(pairs)):
                found = cosines(own[rows], block[columns])
                slope, products = slopes(found, scale, of_rows[rows], of_block[columns], slope_dtype(own.dtype))
                in_scale[rows] += products
                if origin == rank:
                    self._add_own_pairs(slope, found, rows, columns, scale, of_rows, of_columns)
                if own_gradient is not None:
                    add_product(own_gradient[rows], slope, block[columns])
                if earned is not None:
                    add_product(earned[columns], slope.T, own[rows])
                del found, slope
            if earned is not None:
                visits.give(earned)
        in_scale -= 2 * together
        factor = scale / (2 * len(own))
        for gradient in (own_gradient, visits.collected):
            if gradient is not None:
                gradient.mul_(factor)
        return loss, own_gradient, visits.collected, in_scale.sum() / (2 * len(own))

    def _add_own_pairs(
        self,
        slope: torch.Tensor,
        found: torch.Tensor,
        rows: slice,
        columns: slice,
        scale: torch.Tensor,
        of_rows: torch.Tensor,
        of_columns: torch.Tensor,
    ) -> None:
        """Put the slopes of a tile's own pairs in: their two probabilities less 2, before any is rounded.

        In bfloat16 a probability of 0.999 is 1, and nothing would be left to learn.
        """
        top, bottom = max(rows.start, columns.start), min(rows.stop, columns.stop)
        if top >= bottom:
            return
        inside = slice(top - rows.start, bottom - rows.start), slice(top - columns.start, bottom - columns.start)
        logits = found[inside].diagonal() * scale
        down = torch.expm1(logits - of_rows[top:bottom]) + torch.expm1(logits - of_columns[top:bottom])
        slope[inside].diagonal().copy_(down)

    @property
    def _world(self) -> tuple[int, int]:
        return world(self.group) if self.exchange else (1, 0)

    def _log_sums(
        self, own: torch.Tensor, visiting: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) log of the sum of exp(logit) of each own text over all images, and of each own image over all texts."""
        ranks, _ = self._world
        of_rows = own.new_full((len(own),), -torch.inf, dtype=scale.dtype)
        of_columns = of_rows.new_full((ranks, len(own)), -torch.inf)
        for origin, (block,) in BlockExchange([visiting], self.exchange, self.group):
            for rows, columns in tiles(len(own), len(block), self.chunk_size, block.device):
                logits = cosines(own[rows], block[columns]) * scale
                of_rows[rows] = torch.logaddexp(of_rows[rows], logits.logsumexp(1))
                of_columns[origin, columns] = torch.logaddexp(of_columns[origin, columns], logits.logsumexp(0))
        if ranks > 1:
            from_all = torch.empty_like(of_columns)
            dist.all_to_all_single(from_all, of_columns, group=self.group)
            of_columns = from_all
        return of_rows, of_columns.logsumexp(0)
