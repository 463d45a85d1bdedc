"""What the losses share: checks of their inputs, and an autograd function that computes its gradients in forward.

Knows no formula. Shapes: B pairs per rank, D embedding width.
"""

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from siglit.loss.agreement import Agreement, disagreement
from siglit.loss.exchange import EXCHANGES, Exchange, world
from siglit.loss.tiles import wide
from siglit.runtime.matmul import matmul_precision
from siglit.runtime.torch_internals import graph_is_kept

Compute = Callable[..., tuple[torch.Tensor | None, ...]]
_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")


def graph_break(function: Callable[_Params, _Result]) -> Callable[_Params, _Result]:
    """Keep a function out of a caller's `torch.compile`; its type is kept too, which `torch.compiler.disable` loses."""
    disabled: Callable[_Params, _Result] = torch.compiler.disable(function)
    return disabled


class LossWithGradients(torch.autograd.Function):
    """A scalar whose gradients are computed together with its value; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the first result of `compute`, the loss, and keep the others: each input's gradient, or None."""
        with torch.autocast(inputs[0].device.type, enabled=False), matmul_precision("highest"):
            loss, *gradients = compute(*(tensor.detach() for tensor in inputs))
        assert loss is not None
        ctx.save_for_backward(*gradients)
        ctx.like = [(tensor.dtype, tensor.shape) for tensor in inputs]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradients in float32 or wider, then convert them to the types of the inputs."""
        scale = torch.mul if graph_is_kept() else torch.Tensor.mul_  # in place: avoids a copy of the gradients
        saved = zip(ctx.saved_tensors, ctx.like, ctx.needs_input_grad[1:], strict=True)
        return None, *(
            scale(gradient, upstream).to(dtype).reshape(shape) if needed and gradient is not None else None
            for gradient, (dtype, shape), needed in saved
        )


def scalar(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """Return a learned scalar unchanged; a number as a tensor in the type of the loss, on the device of `like`."""
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=wide(like.dtype), device=like.device)


def check(
    zimg: torch.Tensor,
    ztxt: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    exchange: Exchange | None,
    chunk_size: int | None,
    agreement: Agreement | None = None,
    ids: Sequence[torch.Tensor] = (),
    agreed: object = None,
    problem: str | None = None,
) -> None:
    """Check that all ranks have batches of the same shape and the same options, before any rank waits for another.

    With an `agreement`, that holds for the first call alone.

    Args:
        zimg: (B, D).
        ztxt: (B, D).
        group: the ranks.
        exchange: how the ranks exchange blocks; None: not at all.
        chunk_size: side of a tile.
        agreement: how the ranks are compared; None: by a comparison that all of them wait for.
        ids: (B,) each.
        agreed: what else must be the same on all ranks; compared as text.
        problem: an error that this rank has already found.

    Raises:
        ValueError: a rank's batch has the wrong shape or type, an option is not valid, or the ranks differ; raised on
            all ranks.
    """
    shapes = [tuple(tensor.shape) for tensor in (zimg, ztxt)]
    if problem is not None:
        pass
    elif shapes[0] != shapes[1] or zimg.ndim != 2 or len(zimg) == 0:
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
        # The shapes of an invalid batch cannot be described, so its problem takes their place.
        description = problem or f"B, D = {shapes[0]}, {zimg.dtype}, {exchange}, {len(ids)} ids, {agreed}"
        problem = (agreement or disagreement)(description, problem is not None, group, zimg.device)
    if problem is not None:
        raise ValueError(problem)
