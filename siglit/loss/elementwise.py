"""From cosines to losses and gradients in the logits, element by element, in one pass where a compiler is available.

Knows one tile; its positives, its mask and the scalars are arguments. Shapes: r texts × c images.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

COMPILE_FROM = 2**26
"""Pairs per call from which compiling pays: it costs seconds once and saves some tenths of a second per such call."""

_failures: list[str] = []


def all_negative(
    cosines: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses of negatives and their gradients in the logits.

    Args:
        cosines: (r, c), float32 or wider; may be overwritten.
        scale: scalar t.
        bias: scalar b.
        dtype: of the returned gradients, which are multiplied with embeddings next.

    Returns:
        (r, c) grad_logits; (r,) sums over each row of the loss, of grad_logits, and of grad_logits × cosine.
    """
    loss, grad_logits = _softplus_and_sigmoid(cosines * scale + bias)
    sums = loss.sum(1), grad_logits.sum(1), (grad_logits * cosines).sum(1)
    if torch.compiler.is_compiling() and dtype == cosines.dtype:
        # Into the same memory, which one pass then reads and writes.
        grad_logits = cosines.copy_(grad_logits)
    return grad_logits.to(dtype), *sums


def signed(
    cosines: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    positive: torch.Tensor,
    kept: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`all_negative`, where pairs in the (r, c) mask `positive` are positives and only those in (r, c) `kept` count."""
    sign = torch.where(positive, -1.0, 1.0).to(cosines.dtype)
    loss, grad_logits = _softplus_and_sigmoid((cosines * scale + bias).mul_(sign))
    loss, grad_logits = loss.mul_(kept), grad_logits.mul_(sign).mul_(kept)
    return grad_logits.to(dtype), loss.sum(1), grad_logits.sum(1), (grad_logits * cosines).sum(1)


def softmax_grad_logits(
    cosines: torch.Tensor,
    scale: torch.Tensor,
    row_log_sums: torch.Tensor,
    column_log_sums: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of both cross-entropies in each logit, without the term of the positives.

    Args:
        cosines: (r, c), float32 or wider.
        scale: scalar t.
        row_log_sums: (r,) log of the sum of exp(logit) over each text's row of the global batch.
        column_log_sums: (c,) the same over each image's column.
        dtype: of the returned gradients.

    Returns:
        (r, c) grad_logits, the sum of a pair's two probabilities; (r,) sums over each row of grad_logits × cosine.
    """
    logits = cosines * scale
    grad_logits = torch.exp(logits - row_log_sums[:, None]) + torch.exp(logits - column_log_sums)
    return grad_logits.to(dtype), (grad_logits * cosines).sum(1)


def _softplus_and_sigmoid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not torch.compiler.is_compiling():
        # Each torch function is a pass over memory. Above the threshold log(1 + exp x) equals x to the last bit.
        return F.softplus(x, threshold=40), torch.sigmoid(x)
    exp_minus = torch.exp(-x.abs())
    one_plus = 1 + exp_minus
    # log1p as a logarithm plus what rounding 1 + exp_minus lost: on a CPU the compiler has no fast log1p.
    log1p = torch.log(one_plus) + (exp_minus - (one_plus - 1)) / one_plus
    return torch.relu(x) + log1p, torch.where(x >= 0, 1.0, exp_minus) / one_plus


def compiling(pairs: int) -> bool:
    """Tell whether a call with this many pairs is compiled."""
    return pairs >= COMPILE_FROM and not _failures


def fused(function: Callable[..., Any], pairs: int) -> Callable[..., Any]:
    """Return `function`, compiled into one kernel if a call has enough pairs and this machine can compile.

    Where compiling fails, one warning says so, and this and all later calls use the uncompiled function, which returns
    the same values.
    """
    return functools.partial(_compiled_or_not, function) if compiling(pairs) else function


def _compiled_or_not(function: Callable[..., Any], *args: Any) -> Any:
    if not _failures:
        try:
            return _compiled(function)(*args)
        except torch.OutOfMemoryError:  # of the device, which the uncompiled function would run out of too
            raise
        except Exception as error:  # torch raises a dozen types when a compiler is missing or fails
            _failures.append((str(error).strip() or type(error).__name__).splitlines()[0][:200])
            warnings.warn(f"the loss is not compiled and therefore slower: {_failures[0]}", stacklevel=2)
    return function(*args)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
