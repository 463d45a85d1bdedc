"""From cosines to loss and gradient, element by element, in one pass where a compiler is at hand.

Knows one tile; positives, masks and scales come with it. Shapes: r own rows × c visiting rows.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

COMPILE_FROM = 2**26
"""Pairs of one call from which compiling pays: it saves some tenths of a second on each such call and costs seconds."""

_failures: list[str] = []


def all_negative(
    cosines: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and slope of pairs that do not belong together.

    Args:
        cosines: (r, c), float32 or wider; may be overwritten.
        scale: scalar t.
        bias: scalar b.
        dtype: of the slopes, which are multiplied with embeddings next.

    Returns:
        (r, c) slope of the loss in the logit; (r,) sums of the loss, of the slope, and of slope × cosine.
    """
    loss, slope = _softplus_and_sigmoid(cosines * scale + bias)
    sums = loss.sum(1), slope.sum(1), (slope * cosines).sum(1)
    if torch.compiler.is_compiling() and dtype == cosines.dtype:
        # Into the same memory: one pass reads and writes it.
        slope = cosines.copy_(slope)
    return slope.to(dtype), *sums


def signed(
    cosines: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    positive: torch.Tensor,
    kept: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`all_negative`, for pairs of which (r, c) `positive` belong together and (r, c) `kept` count at all."""
    sign = torch.where(positive, -1.0, 1.0).to(cosines.dtype)
    loss, slope = _softplus_and_sigmoid((cosines * scale + bias) * sign)
    loss, slope = loss * kept, slope * sign * kept
    return slope.to(dtype), loss.sum(1), slope.sum(1), (slope * cosines).sum(1)


def softmax_slope(
    cosines: torch.Tensor, scale: torch.Tensor, of_rows: torch.Tensor, of_columns: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slope of the two cross-entropies in each logit, as if no pair belonged together.

    Args:
        cosines: (r, c), float32 or wider.
        scale: scalar t.
        of_rows: (r,) log of the sum of exp(logit) along a row of the global batch.
        of_columns: (c,) the same down a column.
        dtype: of the slopes.

    Returns:
        (r, c) sum of the pair's two probabilities; (r,) sum of slope × cosine.
    """
    logits = cosines * scale
    slope = torch.exp(logits - of_rows[:, None]) + torch.exp(logits - of_columns)
    return slope.to(dtype), (slope * cosines).sum(1)


def _softplus_and_sigmoid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not torch.compiler.is_compiling():
        # Each torch function is a pass over memory. Beyond the threshold log(1 + exp x) is x to the last bit.
        return F.softplus(x, threshold=40), torch.sigmoid(x)
    small = torch.exp(-x.abs())
    one_more = 1 + small
    # log1p as a logarithm and what rounding 1 + small has lost: on a CPU the compiler has no fast log1p.
    log1p = torch.log(one_more) + (small - (one_more - 1)) / one_more
    return torch.relu(x) + log1p, torch.where(x >= 0, 1.0, small) / one_more


def compiling(pairs: int) -> bool:
    """Whether a call with so many pairs is compiled."""
    return pairs >= COMPILE_FROM and not _failures


def fused(function: Callable[..., Any], pairs: int) -> Callable[..., Any]:
    """Return `function`, compiled into one kernel if a call has enough pairs and this machine can compile.

    A machine that cannot is told once and goes on with the uncompiled function, whose values are the same.
    """
    return functools.partial(_compiled_or_not, function) if compiling(pairs) else function


def _compiled_or_not(function: Callable[..., Any], *args: Any) -> Any:
    if not _failures:
        try:
            return _compiled(function)(*args)
        except Exception as error:  # torch names a dozen ways in which a compiler can be missing or fail
            _failures.append((str(error).strip() or type(error).__name__).splitlines()[0][:200])
            warnings.warn(f"the loss is not compiled and therefore slower: {_failures[0]}", stacklevel=2)
    return function(*args)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
