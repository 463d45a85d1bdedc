"""Which parameters a tower never reads, seen in autograd's graph of one forward: no backward, nothing by name.

A pooling leaves out what comes after the tokens it takes, such as a MAP head. DDP waits in vain for the gradients of
such weights.
"""

from contextlib import AbstractContextManager
from typing import NoReturn

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction


def graph_only() -> AbstractContextManager[None]:
    """Have a forward build its graph but keep no tensor for backward: it costs what one without gradients costs."""
    return torch.autograd.graph.saved_tensors_hooks(lambda _: None, _not_kept)


def freeze_unread(module: nn.Module, output: torch.Tensor) -> list[str]:
    """Freeze the parameters that a backward from `output` would leave without a gradient; zeros are a gradient.

    Where a `torch.autograd.Function` is in the graph, nothing is frozen: its backward may well run one of its own, as
    in Reformer's reversible layers, for parameters that the graph does not show.

    Args:
        module: its parameters that require gradients are looked at.
        output: of the module in evaluation mode, where no layer is skipped at random, for a sample of the shape that it
            will train on. May be on the meta device.

    Returns:
        Their names, as in `named_parameters`.
    """
    reached: set[torch.Tensor] = set()
    ahead = [output.grad_fn]
    seen = set(ahead)
    while ahead:
        node = ahead.pop()
        if node is None:
            continue
        if isinstance(node, BackwardCFunction):
            return []
        if isinstance(leaf := getattr(node, "variable", None), torch.Tensor):
            reached.add(leaf)
        following = {after for after, _ in node.next_functions} - seen
        seen |= following
        ahead += following
    unread = [(name, p) for name, p in module.named_parameters() if p.requires_grad and p not in reached]
    for _, parameter in unread:
        parameter.requires_grad_(False)
    return [name for name, _ in unread]


def _not_kept(_: None) -> NoReturn:
    raise AssertionError("a forward under graph_only has no backward")
