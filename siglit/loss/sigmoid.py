"""The sigmoid loss of arXiv:2303.15343, equation 1, over all pairs of a global batch.

Value and gradients are computed tile by tile in forward, because the slope of a pair's loss depends on that pair alone:
what is kept for backward is one row per example, never a square of the batch. Knows nothing of towers or caches.
Shapes: B pairs per rank, W ranks, D embedding width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
import torch.distributed as dist
from torch.nn import functional as F

from siglit.loss.composition import (
    Ambiguous,
    Negatives,
    Selection,
    Tile,
    count_digits,
    least_kept,
    priority_bits,
)
from siglit.loss.elementwise import all_negative, compiling, fused, signed
from siglit.loss.exchange import BlockExchange, Exchange, world
from siglit.loss.function import LossWithGradients, check, scalar
from siglit.loss.tiles import add_product, cosines, slope_dtype, tiles, wide


@torch.compiler.disable
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
) -> torch.Tensor:
    """Mean over this rank's texts of the summed loss against every image of the global batch.

    `-(1/B) sum_i sum_j log sigmoid(z_ij (t x_i·y_j + b))`, z = +1 for the pair's own image and −1 otherwise. The images
    visit the ranks; the mean of the ranks' losses, which DDP takes of their gradients, is then exactly the global loss,
    without a correction by W. Gradients are computed for the inputs that require them, images included: what they earn
    on other ranks comes home in forward, so backward communicates nothing. (It therefore takes the other ranks'
    upstream gradient to be this rank's own, as in any training step.) Logits and sums are float32, or float64 for
    float64 inputs, whatever autocast says.

    Args:
        zimg: (B, D) unit rows; float32, float64, bfloat16 or float16.
        ztxt: (B, D) unit rows of the same type, paired with `zimg` row by row.
        logit_scale: scalar t > 0.
        logit_bias: scalar b.
        group: ranks that share the global batch; None: all ranks, or this process alone.
        exchange: how images travel, see `BlockExchange`; the value is the same up to rounding. None: the loss of this
            process alone, whether or not there are others.
        chunk_size: pairs are worked on in tiles of chunk_size × chunk_size; None: chosen for the device.
        negatives: which negatives count (paper, section 4.7); None: all.
        image_ids: (B,) int64; with `text_ids`, pairs of different rows that share an id are ambiguous.
        text_ids: (B,) int64.
        ambiguous: leave ambiguous pairs out ("drop") or count them as positives ("positive").
        statistics: a dict to fill with figures of the global batch as scalars: "positives" and "negatives" (pairs that
            counted), "positive_logit" and "negative_logit" (their means), "positive_share" (of the loss).

    Returns:
        Scalar loss of this rank, float32 or wider.

    Raises:
        ValueError: the two sides differ in shape or type, the batch is empty, or the ranks do not agree; then all of
            them raise.
    """
    ids = [i.to(zimg.device, torch.int64) for i in (image_ids, text_ids) if i is not None]
    grad = torch.is_grad_enabled()
    plan = _Plan(
        group=group,
        exchange=exchange,
        chunk_size=chunk_size,
        negatives=negatives,
        ids=ids,
        ambiguous=ambiguous,
        statistics=statistics,
        own_gradient=grad and ztxt.requires_grad,
        visiting_gradient=grad and zimg.requires_grad,
    )
    given = image_ids is not None, text_ids is not None
    agreed = "sigmoid", negatives, ambiguous, given, plan.visiting_gradient, statistics is not None
    problem = None
    if ambiguous not in get_args(Ambiguous):
        problem = f"ambiguous is {ambiguous!r}, it must be one of {', '.join(get_args(Ambiguous))}"
    check(zimg, ztxt, group=group, exchange=exchange, chunk_size=chunk_size, ids=ids, agreed=agreed, problem=problem)
    scalars = scalar(logit_scale, ztxt), scalar(logit_bias, ztxt)

    def compute(
        own: torch.Tensor, visiting: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        return _Sums(own, visiting, scale, bias, plan).walk()

    loss: torch.Tensor = LossWithGradients.apply(compute, ztxt, zimg, *scalars)
    return loss


@dataclass(frozen=True)
class _Plan:
    """How a call is to be computed."""

    group: dist.ProcessGroup | None
    exchange: Exchange | None
    chunk_size: int | None
    negatives: Negatives | None
    ids: list[torch.Tensor]
    ambiguous: Ambiguous
    statistics: dict[str, torch.Tensor] | None
    own_gradient: bool
    visiting_gradient: bool

    @property
    def world(self) -> tuple[int, int]:
        """(W, rank)."""
        return world(self.group) if self.exchange else (1, 0)


class _Sums:
    """What adds up over the tiles of all visiting blocks."""

    def __init__(self, own: torch.Tensor, visiting: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, plan: _Plan):
        self.own, self.visiting, self.plan = own, visiting, plan
        self.ranks, self.rank = plan.world
        self.batch, self.dtype = len(own), wide(own.dtype)
        self.scale, self.bias = (value.to(self.dtype).reshape(()) for value in (scale, bias))
        self.pairs = self.batch**2 * self.ranks
        # Of each row, so that no sum grows so large that small terms drown in it: loss, slope, slope × cosine.
        self.rows = own.new_zeros(self.batch, 3, dtype=self.dtype)
        self.own_gradient = torch.zeros_like(own, dtype=self.dtype) if plan.own_gradient else None
        # Of positives, and of all pairs: how many, their logits, their losses.
        self.counted = own.new_zeros(2, 3, dtype=torch.float64)

    def walk(self) -> tuple[torch.Tensor | None, ...]:
        """Meet every block of the global batch; loss, and its gradients in own rows, visiting rows, scale and bias."""
        plan = self.plan
        select = None if plan.negatives is None and not plan.ids else self._selection()
        visits = self._visits()
        for origin, (block, *ids) in visits:
            earned = torch.zeros_like(block, dtype=self.dtype) if plan.visiting_gradient else None
            for rows, columns in self._tiles(block):
                found = cosines(self.own[rows], block[columns])
                if select is None:
                    slope = self._add_plain(found, rows, columns, own_block=origin == self.rank)
                else:
                    slope = self._add_selected(found, rows, *select(found, self._tile(origin, rows, columns, ids)))
                if self.own_gradient is not None:
                    add_product(self.own_gradient[rows], slope, block[columns])
                if earned is not None:
                    add_product(earned[columns], slope.T, self.own[rows])
                del found, slope  # before the next tile is made, not after
            if plan.statistics is not None and select is None:
                together = self.own.to(self.dtype).sum(0) @ block.to(self.dtype).sum(0)
                self.counted[1, 1] += together * self.scale + self.bias * self.batch * len(block)
            if earned is not None:
                visits.give(earned)
        if plan.statistics is not None:
            if select is None:
                self.counted[1, 0] = self.pairs
            self.counted[1, 2] = self.rows[:, 0].sum()
            self._tell(plan.statistics)
        loss, in_bias, in_scale = (self.rows.sum(0) / self.batch).unbind()
        for gradient in (self.own_gradient, visits.collected):
            if gradient is not None:
                gradient.mul_(self.scale / self.batch)
        return loss, self.own_gradient, visits.collected, in_scale, in_bias

    def _add_plain(self, found: torch.Tensor, rows: slice, columns: slice, own_block: bool) -> torch.Tensor:
        """Add a tile whose positives are on the diagonal of the rank's own block; return its slopes."""
        top, bottom = max(rows.start, columns.start), min(rows.stop, columns.stop)
        diagonal = None
        if own_block and top < bottom:
            inside = slice(top - rows.start, bottom - rows.start), slice(top - columns.start, bottom - columns.start)
            diagonal = found[inside].diagonal()
            positive = diagonal.clone()
            # As a negative so far off that nothing of it is left; its own terms are put in below.
            diagonal.copy_((-1e4 - self.bias) / self.scale)
        slope, *sums = fused(all_negative, self.pairs)(found, self.scale, self.bias, slope_dtype(self.own.dtype))
        self.rows[rows] += torch.stack(sums, dim=1)
        if diagonal is not None:
            logits = positive * self.scale + self.bias
            loss, down = F.softplus(-logits, threshold=40), -torch.sigmoid(-logits)
            self.rows[top:bottom] += torch.stack([loss, down, down * positive], dim=1)
            slope[inside].diagonal().copy_(down)
            self.counted[0] += torch.stack([self.counted.new_tensor(bottom - top), logits.sum(), loss.sum()])
        return slope

    def _add_selected(
        self, found: torch.Tensor, rows: slice, positive: torch.Tensor, kept: torch.Tensor
    ) -> torch.Tensor:
        """Add a tile of which (r, c) `positive` are positives and (r, c) `kept` count; return its slopes."""
        slope, *sums = fused(signed, self.pairs)(
            found, self.scale, self.bias, positive, kept, slope_dtype(self.own.dtype)
        )
        self.rows[rows] += torch.stack(sums, dim=1)
        if self.plan.statistics is not None:
            logits = found * self.scale + self.bias
            loss = F.softplus(-logits, threshold=40)
            for row, among in enumerate((positive, kept)):
                self.counted[row, :2] += torch.stack([among.sum(), (logits * among).sum()])
            self.counted[0, 2] += (loss * positive).sum()
        return slope

    def _selection(self) -> Selection:
        """Look at all pairs, if need be several times, to find which negatives are kept."""
        negatives = self.plan.negatives
        select = Selection(self.plan.ambiguous, negatives)
        if negatives is None:
            return select
        bits = priority_bits(self.dtype, negatives)

        def count(prefix: int | None, shift: int) -> torch.Tensor:
            total: torch.Tensor | int = 0
            for origin, (block, *ids) in self._visits():
                for rows, columns in self._tiles(block):
                    found = cosines(self.own[rows], block[columns])
                    tile = self._tile(origin, rows, columns, ids)
                    priority = tile.priority(found, negatives)[select.kinds(found, tile)[1]]
                    total = count_digits(priority, bits, prefix, shift) + total
            assert isinstance(total, torch.Tensor)
            if self.ranks > 1:
                dist.all_reduce(total, group=self.plan.group)
            return total

        wanted = round(negatives.per_positive * self.batch * self.ranks)
        return Selection(self.plan.ambiguous, negatives, least_kept(count, bits, wanted))

    def _visits(self) -> BlockExchange:
        return BlockExchange([self.visiting, *self.plan.ids], self.plan.exchange, self.plan.group)

    def _tiles(self, block: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        return tiles(self.batch, len(block), self.plan.chunk_size, block.device, compiling(self.pairs))

    def _tile(self, origin: int, rows: slice, columns: slice, ids: list[torch.Tensor]) -> Tile:
        return Tile(
            row=self.rank * self.batch + rows.start,
            column=origin * self.batch + columns.start,
            own_ids=[of_all[rows] for of_all in self.plan.ids],
            visiting_ids=[of_all[columns] for of_all in ids],
        )

    def _tell(self, statistics: dict[str, torch.Tensor]) -> None:
        if self.ranks > 1:
            dist.all_reduce(self.counted, group=self.plan.group)
        positive, negative = self.counted[0], self.counted[1] - self.counted[0]
        statistics.update(
            positives=positive[0],
            negatives=negative[0],
            positive_logit=positive[1] / positive[0],
            negative_logit=negative[1] / negative[0],
            positive_share=positive[2] / self.counted[1, 2],
        )
