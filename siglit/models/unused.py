"""Find the parameters that a tower never uses, from the autograd graph of one forward pass.

Runs no backward and knows no parameter by name. A pooling skips what comes after the tokens it takes, such as a MAP
head; DDP waits in vain for the gradients of those weights.
"""

from contextlib import AbstractContextManager
from typing import NoReturn

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction


def graph_only() -> AbstractContextManager[None]:
    """Context in which a forward builds its graph but keeps no tensor for backward, at the cost of no_grad."""
    return torch.autograd.graph.saved_tensors_hooks(lambda _: None, _refuse_backward)


def freeze_unused(module: nn.Module, output: torch.Tensor) -> list[str]:
    """Freeze the parameters that a backward from `output` would leave without a gradient; zeros are a gradient.

    Freezes nothing where the graph contains a `torch.autograd.Function`: its backward may run one of its own, as in
    Reformer's reversible layers, for parameters that the graph does not show.

    Args:
        module: the module; only its parameters that require gradients are considered.
        output: what the module in evaluation mode, where no layer is skipped at random, returns for a sample of the
            shape that it will train on. May be on the meta device.

    Returns:
        Names of the parameters that it froze, as in `named_parameters`.
    """
    reached: set[torch.Tensor] = set()
    pending = [output.grad_fn]
    seen = set(pending)
    while len(pending) > 0:
        node = pending.pop()
        if node is None:
            continue
        if isinstance(node, BackwardCFunction):
            return []
        if isinstance(leaf := getattr(node, "variable", None), torch.Tensor):
            reached.add(leaf)
        inputs = {after for after, _ in node.next_functions} - seen
        seen |= inputs
        pending += inputs
    unused = [(name, p) for name, p in module.named_parameters() if p.requires_grad and p not in reached]
    for _, parameter in unused:
        parameter.requires_grad_(False)
    return [name for name, _ in unused]


def _refuse_backward(_: None) -> NoReturn:
    raise AssertionError("a forward under graph_only has no backward")
