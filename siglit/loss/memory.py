"""Bytes that a call of the loss holds, from its sizes and options alone.

Knows nothing of towers or experiments. Shapes: B pairs per rank, W ranks, D embedding width.
"""

from dataclasses import dataclass

import torch

from siglit.loss.composition import STRIP
from siglit.loss.elementwise import compiling
from siglit.loss.exchange import Exchange, blocks_held
from siglit.loss.tiles import grad_logits_dtype, tiles, wide


@dataclass(frozen=True)
class LossMemory:
    """Bytes per rank, besides the embeddings that the loss is called with."""

    rows: int
    """Blocks of other ranks, and gradients: in proportion to B · D."""
    tile: int
    """One tile of pairs, of which neither B nor W changes the size once they are large."""


def memory_bytes(
    pairs: int,
    dim: int,
    *,
    world_size: int = 1,
    exchange: Exchange | None = "bidir",
    dtype: torch.dtype = torch.float32,
    image_gradient: bool = False,
    selected: bool = False,
    chunk_size: int | None = None,
    device: torch.device | str = "cpu",
    compiled: bool | None = None,
) -> LossMemory:
    """Compute the most bytes that `sigmoid_loss` holds, with gradients for its texts.

    `softmax_loss` takes 2 · W · B scalars more.

    Args:
        pairs: B.
        dim: D.
        world_size: W.
        exchange: how images travel, see `BlockExchange`; None: not at all.
        dtype: of the embeddings.
        image_gradient: whether images require a gradient, as where the image tower is trained.
        selected: whether ids or a choice of negatives decide which pairs count.
        chunk_size: as given to the loss.
        device: where the loss is computed.
        compiled: whether the elementwise part is compiled into one kernel; None: as for a call with this many pairs.
    """
    accumulator, product = wide(dtype), grad_logits_dtype(dtype)
    remote, grads = blocks_held(exchange, world_size)
    grads = 1 + (grads if image_gradient else 0)
    if compiled is None:
        compiled = compiling(pairs * pairs * world_size)
    rows, columns = next(tiles(pairs, pairs, chunk_size, torch.device(device), compiled))
    # Cosines, losses, grad_logits, and grad_logits × cosines. Compiled, grad_logits replace the cosines in place if
    # their types are equal.
    separate = product.itemsize if product != accumulator else 0
    per_pair = accumulator.itemsize + separate if compiled else 4 * accumulator.itemsize
    tile = (rows.stop - rows.start) * (columns.stop - columns.start)
    fixed = 0
    if selected and compiled:
        # Beside the cosines, either priorities or grad_logits, and three masks; and hashes of a part of the tile.
        per_pair = accumulator.itemsize + max(accumulator.itemsize, product.itemsize) + 3
        fixed = 4 * torch.int64.itemsize * min(tile, STRIP.get(torch.device(device).type, STRIP["cuda"]))
    elif selected:
        # The signs of the logits and two masks more.
        per_pair += accumulator.itemsize + 2
    return LossMemory(
        rows=pairs * dim * (remote * dtype.itemsize + grads * accumulator.itemsize), tile=tile * per_pair + fixed
    )
