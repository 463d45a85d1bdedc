"""The sigmoid loss of arXiv:2303.15343, equation 1, over all pairs of a global batch.

Value and gradients are computed tile by tile in forward, because the gradient of a pair's loss in its logit depends on
that pair alone. What is kept for backward is one row per example, never all pairs of a batch. Knows nothing of towers
or caches. Shapes: B pairs per rank, W ranks, D embedding width, r × c texts × images of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
import torch.distributed as dist
from torch.nn import functional as F

from siglit.loss.agreement import Agreement
from siglit.loss.composition import (
    Ambiguous,
    Negatives,
    Selection,
    Tile,
    count_digits,
    find_threshold,
    priority_bits,
)
from siglit.loss.elementwise import all_negative, compiling, fused, signed
from siglit.loss.exchange import BlockExchange, Exchange, world
from siglit.loss.function import LossWithGradients, check, graph_break, scalar
from siglit.loss.tiles import add_product, cosines, grad_logits_dtype, tiles, wide


@graph_break
def sigmoid_loss(
    zimg: torch.Tensor,
    ztxt: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange | None = "bidir",
    chunk_size: int | None = None,
    negatives: Negatives | None = None,
    image_ids: torch.Tensor | None = None,
    text_ids: torch.Tensor | None = None,
    ambiguous: Ambiguous = "drop",
    statistics: "dict[str, torch.Tensor] | None" = None,
    agreement: Agreement | None = None,
) -> torch.Tensor:
    """Mean over this rank's texts of the summed loss against every image of the global batch.

    `-(1/B) sum_i sum_j log sigmoid(z_ij (t x_i·y_j + b))`, z = +1 for the text's own image and −1 otherwise. Texts stay
    on their rank and images travel. The mean over the ranks' losses is exactly the global loss, and the mean over their
    gradients, which DDP takes, is its gradient, without a correction by W. Gradients are computed for the inputs that
    require them. Those of images are returned from the other ranks in forward, so backward communicates nothing; it
    assumes that all ranks have the same upstream gradient, as in any training step. Logits and sums are float32, or
    float64 for float64 inputs, whatever autocast says.

    Args:
        zimg: (B, D) unit rows; float32, float64, bfloat16 or float16.
        ztxt: (B, D) unit rows of the same type, paired with `zimg` row by row.
        logit_scale: scalar t > 0.
        logit_bias: scalar b.
        group: ranks that share the global batch; None: all ranks, or this process alone.
        exchange: how images travel, see `BlockExchange`; the value is the same up to rounding. None: the loss of this
            process alone, even in a larger group.
        chunk_size: pairs are computed in tiles of chunk_size × chunk_size; None: chosen for the device.
        negatives: which negatives count (paper, section 4.7); None: all.
        image_ids: (B,) int64; with `text_ids`, pairs of different rows that share an id are ambiguous.
        text_ids: (B,) int64.
        ambiguous: leave ambiguous pairs out ("drop") or count them as positives ("positive").
        statistics: a dict to fill with scalars of the global batch: "positives" and "negatives" (pairs that counted),
            "positive_logit" and "negative_logit" (mean logits), "positive_share" (of the loss).
        agreement: for calls in a loop, the same object in each: from the second call on, ranks that differ raise one
            call later, unless they differ in B, D, type or exchange or one of them has failed, which leaves the others
            waiting. None: the ranks compare shapes and options, and wait.

    Returns:
        Scalar loss of this rank, float32 or wider.

    Raises:
        ValueError: images and texts differ in shape or type, the batch is empty, an option is not valid, or the ranks'
            batches or options differ; raised on all ranks (see `agreement`).
    """
    ids = [i.to(zimg.device, torch.int64) for i in (image_ids, text_ids) if i is not None]
    grad = torch.is_grad_enabled()
    options = _Options(
        group=group,
        exchange=exchange,
        chunk_size=chunk_size,
        negatives=negatives,
        ids=ids,
        ambiguous=ambiguous,
        statistics=statistics,
        image_gradient=grad and zimg.requires_grad,
        text_gradient=grad and ztxt.requires_grad,
    )
    has_ids = image_ids is not None, text_ids is not None
    agreed = "sigmoid", negatives, ambiguous, has_ids, options.image_gradient, statistics is not None
    problem = None
    if ambiguous not in get_args(Ambiguous):
        problem = f"ambiguous is {ambiguous!r}, it must be one of {', '.join(get_args(Ambiguous))}"
    check(
        zimg,
        ztxt,
        group=group,
        exchange=exchange,
        chunk_size=chunk_size,
        agreement=agreement,
        ids=ids,
        agreed=agreed,
        problem=problem,
    )
    scalars = scalar(logit_scale, ztxt), scalar(logit_bias, ztxt)

    def compute(
        zimg: torch.Tensor, ztxt: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        return _SigmoidLoss(zimg, ztxt, scale, bias, options).compute()

    loss: torch.Tensor = LossWithGradients.apply(compute, zimg, ztxt, *scalars)
    return loss


@dataclass(frozen=True)
class _Options:
    """How a call is computed."""

    group: dist.ProcessGroup | None
    exchange: Exchange | None
    chunk_size: int | None
    negatives: Negatives | None
    ids: list[torch.Tensor]
    ambiguous: Ambiguous
    statistics: dict[str, torch.Tensor] | None
    image_gradient: bool
    text_gradient: bool

    @property
    def world(self) -> tuple[int, int]:
        """(W, rank)."""
        return world(self.group) if self.exchange else (1, 0)


class _SigmoidLoss:
    """The sums over all tiles of all blocks of the global batch."""

    def __init__(
        self, zimg: torch.Tensor, ztxt: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, options: _Options
    ):
        self.zimg, self.ztxt, self.options = zimg, ztxt, options
        self.ranks, self.rank = options.world
        self.batch, self.dtype = len(ztxt), wide(ztxt.dtype)
        self.scale, self.bias = (value.to(self.dtype).reshape(()) for value in (scale, bias))
        self.pairs = self.batch**2 * self.ranks
        # By text, so that no sum grows so large that small terms are rounded away: of the loss, of grad_logits, and of
        # grad_logits × cosine.
        self.row_sums = ztxt.new_zeros(self.batch, 3, dtype=self.dtype)
        self.grad_ztxt = torch.zeros_like(ztxt, dtype=self.dtype) if options.text_gradient else None
        # Of positives, and of all pairs that count: their number, the sum of their logits and of their losses.
        self.totals = ztxt.new_zeros(2, 3, dtype=torch.float64)

    def compute(self) -> tuple[torch.Tensor | None, ...]:
        """Return the loss and its gradients in images, texts, scale and bias."""
        select = None if self.options.negatives is None and len(self.options.ids) == 0 else self._selection()
        exchange = self._exchange()
        for owner, (block, *ids) in exchange:
            block_grad = self._add_block(owner, block, ids, select)
            if block_grad is not None:
                exchange.return_grad(block_grad)
        if self.options.statistics is not None:
            if select is None:
                self.totals[1, 0] = self.pairs
            self.totals[1, 2] = self.row_sums[:, 0].sum()
            self._fill(self.options.statistics)
        loss, grad_bias, grad_scale = (self.row_sums.sum(0) / self.batch).unbind()
        for gradient in (exchange.local_grad, self.grad_ztxt):
            if gradient is not None:
                gradient.mul_(self.scale / self.batch)
        return loss, exchange.local_grad, self.grad_ztxt, grad_scale, grad_bias

    def _add_block(
        self, owner: int, block: torch.Tensor, ids: list[torch.Tensor], select: Selection | None
    ) -> torch.Tensor | None:
        """Add the pairs of the local texts with a block of images; return the block's gradient if images need one.

        Args:
            owner: rank that the block belongs to.
            block: (B, D) images.
            ids: (B,) each, of the block's pairs.
            select: which pairs count and as what; None: all, as positives on the diagonal only.
        """
        block_grad = torch.zeros_like(block, dtype=self.dtype) if self.options.image_gradient else None
        for rows, columns in self._tiles(block):
            cos = cosines(self.ztxt[rows], block[columns])
            if select is None:
                grad_logits = self._add_plain(cos, rows, columns, is_local=owner == self.rank)
            else:
                grad_logits = self._add_selected(cos, rows, *select(cos, self._tile(owner, rows, columns, ids)))
            if self.grad_ztxt is not None:
                add_product(self.grad_ztxt[rows], grad_logits, block[columns])
            if block_grad is not None:
                add_product(block_grad[columns], grad_logits.T, self.ztxt[rows])
            del cos, grad_logits  # before the next tile is allocated, not after
        if self.options.statistics is not None and select is None:
            cos_sum = self.ztxt.to(self.dtype).sum(0) @ block.to(self.dtype).sum(0)
            self.totals[1, 1] += cos_sum * self.scale + self.bias * self.batch * len(block)
        return block_grad

    def _add_plain(self, cos: torch.Tensor, rows: slice, columns: slice, is_local: bool) -> torch.Tensor:
        """Add a tile in which all pairs count and positives are on the diagonal of the local block.

        Args:
            cos: (r, c) cosines, overwritten.
            rows: the tile's texts.
            columns: the tile's images.
            is_local: the images are this rank's own.

        Returns:
            (r, c) grad_logits.
        """
        top, bottom = max(rows.start, columns.start), min(rows.stop, columns.stop)
        diagonal = None
        if is_local and top < bottom:
            inside = slice(top - rows.start, bottom - rows.start), slice(top - columns.start, bottom - columns.start)
            diagonal = cos[inside].diagonal()
            positive = diagonal.clone()
            # As negatives whose logit is so small that they add nothing; the positives' own terms are added below.
            diagonal.copy_((-1e4 - self.bias) / self.scale)
        grad_logits, *sums = fused(all_negative, self.pairs)(
            cos, self.scale, self.bias, grad_logits_dtype(self.ztxt.dtype)
        )
        self.row_sums[rows] += torch.stack(sums, dim=1)
        if diagonal is not None:
            logits = positive * self.scale + self.bias
            loss, grad = F.softplus(-logits, threshold=40), -torch.sigmoid(-logits)
            self.row_sums[top:bottom] += torch.stack([loss, grad, grad * positive], dim=1)
            grad_logits[inside].diagonal().copy_(grad)
            self.totals[0, 0] += bottom - top
            self.totals[0, 1:] += torch.stack([logits.sum(), loss.sum()])
        return grad_logits

    def _add_selected(self, cos: torch.Tensor, rows: slice, positive: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Add a tile of which (r, c) `positive` are positives and (r, c) `kept` count; return (r, c) grad_logits."""
        grad_logits, *sums = fused(signed, self.pairs)(
            cos, self.scale, self.bias, positive, kept, grad_logits_dtype(self.ztxt.dtype)
        )
        self.row_sums[rows] += torch.stack(sums, dim=1)
        if self.options.statistics is not None:
            logits = cos * self.scale + self.bias
            loss = F.softplus(-logits, threshold=40)
            for row, mask in enumerate((positive, kept)):
                self.totals[row, :2] += torch.stack([mask.sum(), (logits * mask).sum()])
            self.totals[0, 2] += (loss * positive).sum()
        return grad_logits

    def _selection(self) -> Selection:
        """Find which negatives are kept; goes over all pairs several times where logits decide."""
        negatives = self.options.negatives
        select = Selection(self.options.ambiguous, negatives)
        if negatives is None:
            return select
        bits = priority_bits(self.dtype, negatives)

        def count(prefix: torch.Tensor | None, shift: int) -> torch.Tensor:
            total: torch.Tensor | int = 0
            for owner, (block, *ids) in self._exchange():
                for rows, columns in self._tiles(block):
                    cos = cosines(self.ztxt[rows], block[columns])
                    tile = self._tile(owner, rows, columns, ids)
                    _, negative = select.unmasked(cos, tile)
                    total = count_digits(tile.priority(cos, negatives), negative, bits, prefix, shift) + total
            assert isinstance(total, torch.Tensor)
            if self.ranks > 1:
                dist.all_reduce(total, group=self.options.group)
            return total

        keep = round(negatives.per_positive * self.batch * self.ranks)
        return Selection(self.options.ambiguous, negatives, find_threshold(count, bits, keep))

    def _exchange(self) -> BlockExchange:
        return BlockExchange([self.zimg, *self.options.ids], self.options.exchange, self.options.group)

    def _tiles(self, block: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        return tiles(self.batch, len(block), self.options.chunk_size, block.device, compiling(self.pairs))

    def _tile(self, owner: int, rows: slice, columns: slice, ids: list[torch.Tensor]) -> Tile:
        return Tile(
            row=self.rank * self.batch + rows.start,
            column=owner * self.batch + columns.start,
            row_ids=[of_all[rows] for of_all in self.options.ids],
            column_ids=[of_all[columns] for of_all in ids],
        )

    def _fill(self, statistics: dict[str, torch.Tensor]) -> None:
        if self.ranks > 1:
            dist.all_reduce(self.totals, group=self.options.group)
        positive, negative = self.totals[0], self.totals[1] - self.totals[0]
        statistics.update(
            positives=positive[0],
            negatives=negative[0],
            positive_logit=positive[1] / positive[0],
            negative_logit=negative[1] / negative[0],
            positive_share=positive[2] / self.totals[1, 2],
        )
