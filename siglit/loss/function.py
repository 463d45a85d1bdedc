"""What the losses of this package share: checked inputs, and an autograd function whose gradients are made in forward.

Knows no formula. Shapes: B pairs per rank, D embedding width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from siglit.loss.exchange import EXCHANGES, Exchange, disagreement, world
from siglit.loss.tiles import wide

Compute = Callable[..., tuple[torch.Tensor | None, ...]]


class LossWithGradients(torch.autograd.Function):
    """A scalar whose gradients are known as soon as its value is; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the first thing that `compute` gives for the inputs; the others are their gradients, or None."""
        with torch.autocast(inputs[0].device.type, enabled=False):
            loss, *gradients = compute(*(tensor.detach() for tensor in inputs))
        assert loss is not None
        ctx.save_for_backward(*gradients)
        ctx.like = [(tensor.dtype, tensor.shape) for tensor in inputs]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradients, in their own wide type, before they take the inputs'."""
        scale = torch.mul if _graph_is_kept() else torch.Tensor.mul_  # in place: there is no need for a second copy
        saved = zip(ctx.saved_tensors, ctx.like, ctx.needs_input_grad[1:], strict=True)
        return None, *(
            scale(gradient, upstream).to(dtype).reshape(shape) if wanted and gradient is not None else None
            for gradient, (dtype, shape), wanted in saved
        )


def _graph_is_kept() -> bool:
    """Whether backward may be asked for again (`retain_graph`); true where this torch does not tell."""
    tells: Callable[[], bool] | None = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return tells is None or tells()


def scalar(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A learned scalar as it is; a number in the type of the loss, where the embeddings are."""
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=wide(like.dtype), device=like.device)


def check(
    zimg: torch.Tensor,
    ztxt: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    exchange: Exchange | None,
    chunk_size: int | None,
    ids: Sequence[torch.Tensor] = (),
    agreed: object = None,
    problem: str | None = None,
) -> None:
    """Make sure that every rank brings one batch of the same shape, before any waits for another.

    Args:
        zimg: (B, D).
        ztxt: (B, D).
        group: the ranks.
        exchange: how they will exchange blocks; None: not at all.
        chunk_size: side of a tile.
        ids: (B,) each.
        agreed: what else must be the same on all ranks, as text shows it.
        problem: what is known to be wrong on this rank already.

    Raises:
        ValueError: something is wrong with a rank's batch, or they differ; raised on all ranks.
    """
    shapes = [tuple(tensor.shape) for tensor in (zimg, ztxt)]
    if problem is not None:
        pass
    elif shapes[0] != shapes[1] or zimg.ndim != 2 or not len(zimg):
        problem = f"the loss needs two (B, D) tensors of one shape, got {shapes[0]} and {shapes[1]}"
    elif zimg.dtype != ztxt.dtype or not zimg.is_floating_point():
        problem = f"the loss needs images and texts of one floating-point type, got {zimg.dtype} and {ztxt.dtype}"
    elif any(of_pairs.shape != (len(zimg),) for of_pairs in ids):
        problem = f"image_ids and text_ids must be {(len(zimg),)}, got {[tuple(i.shape) for i in ids]}"
    elif chunk_size is not None and chunk_size < 1:
        problem = f"chunk_size is {chunk_size}, it must be 1 or more"
    elif exchange not in (*EXCHANGES, None):
        problem = f"exchange is {exchange!r}, it must be one of {', '.join(EXCHANGES)}"
    if exchange is not None and world(group)[0] > 1:
        # A rank's wrong batch may have no rows to speak of.
        brought = problem or f"B, D = {shapes[0]}, {zimg.dtype}, {exchange}, {len(ids)} ids, {agreed}"
        problem = disagreement(brought, problem is not None, group, zimg.device)
    if problem is not None:
        raise ValueError(problem)
