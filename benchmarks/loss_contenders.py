"""The contenders of `benchmarks.loss`: each computes a value and its gradients for one batch of pairs.

Peers are open_clip's module as installed, the same formula in strips, and what people write by hand. The matrix
products alone are the limit: no exact loss can be faster. Shapes: n pairs, D embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from siglit.loss import elementwise, sigmoid_loss
from siglit.loss.tiles import tiles

STRIP = 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS = ("siglit", "siglit, eager")
PEERS = ("open_clip", f"open_clip's formula, strips of {STRIP} under autograd", "labels and logsigmoid")
RECOMPUTED = f"strips of {STRIP}, recomputed in backward"
"""No package has it; listed because it is the leanest that autograd can do, at the price of one more product."""
LIMITS = ("products alone, in tiles", "products alone, at once")


@dataclass(frozen=True)
class Pairs:
    """Random unit rows, and t' and b as a trainer has them."""

    zimg: torch.Tensor
    """(n, D); requires a gradient if both sides are trained."""
    ztxt: torch.Tensor
    """(n, D)."""
    log_scale: torch.Tensor
    """t' = log t."""
    bias: torch.Tensor
    """b."""

    @classmethod
    def draw(cls, n: int, dim: int, dtype: str, unlocked: bool, device: str) -> "Pairs":
        """Draw n pairs, the same for the same arguments."""
        generator = torch.Generator().manual_seed(0)
        sides = [F.normalize(torch.randn(n, dim, generator=generator), dim=1).to(device, DTYPES[dtype]) for _ in "xy"]
        log_scale = torch.tensor(10.0, device=device).log().requires_grad_()
        bias = torch.tensor(-10.0, device=device, requires_grad=True)
        return cls(sides[0].requires_grad_(unlocked), sides[1].requires_grad_(), log_scale, bias)

    def backward(self, loss: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Take value and gradients of loss(zimg, ztxt, t, b); return the value."""
        inputs = (self.zimg, self.ztxt, self.log_scale, self.bias)
        for tensor in inputs:
            tensor.grad = None
        value = loss(self.zimg, self.ztxt, self.log_scale.exp(), self.bias)
        value.backward()
        return value.detach()

    def gradient_bytes(self) -> int:
        """How large the gradients are."""
        return sum(tensor.nbytes for tensor in (self.zimg, self.ztxt) if tensor.requires_grad)


def contenders(pairs: Pairs) -> dict[str, Callable[[], torch.Tensor | None]]:
    """Forward and backward of each by name; open_clip's only where it is installed."""
    runs: dict[str, Callable[[], torch.Tensor | None]] = {
        "siglit": lambda: pairs.backward(sigmoid_loss),
        "siglit, eager": lambda: _eager(pairs),
        PEERS[1]: lambda: pairs.backward(in_strips),
        PEERS[2]: lambda: pairs.backward(by_hand),
        RECOMPUTED: lambda: pairs.backward(in_recomputed_strips),
        LIMITS[0]: lambda: _products(pairs, at_once=False),
        LIMITS[1]: lambda: _products(pairs, at_once=True),
    }
    try:
        from open_clip.loss import SigLipLoss
    except ImportError:
        return runs
    return runs | {PEERS[0]: lambda: pairs.backward(SigLipLoss())}


def by_hand(zimg: torch.Tensor, ztxt: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Equation 1 of the paper as it is printed in Algorithm 1."""
    logits = zimg @ ztxt.T * scale + bias
    labels = 2 * torch.eye(len(zimg), device=zimg.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(zimg)


def in_strips(zimg: torch.Tensor, ztxt: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """open_clip's formula on strips of images, added up; autograd keeps every strip.

    The installed module has no option for it, and its `_loss` takes squares only.
    """
    starts = range(0, len(zimg), STRIP)
    return torch.stack([_strip(zimg, ztxt, scale, bias, start) for start in starts]).sum() / len(zimg)


def in_recomputed_strips(
    zimg: torch.Tensor, ztxt: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """`in_strips`, each computed again in backward."""
    strips = [
        checkpoint(_strip, zimg, ztxt, scale, bias, start, use_reentrant=False) for start in range(0, len(zimg), STRIP)
    ]
    return torch.stack(strips).sum() / len(zimg)


def _strip(zimg: torch.Tensor, ztxt: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, start: int) -> torch.Tensor:
    logits = scale * zimg[start : start + STRIP] @ ztxt.T
    logits += bias
    labels = -torch.ones_like(logits)
    labels[:, start:].fill_diagonal_(1)
    return -F.logsigmoid(labels * logits).sum()


def _eager(pairs: Pairs) -> torch.Tensor:
    with mock.patch.object(elementwise, "COMPILE_FROM", float("inf")):
        return pairs.backward(sigmoid_loss)


@torch.no_grad()
def _products(pairs: Pairs, at_once: bool) -> None:
    """The products that no loss can do without, in the type of the inputs: cosines, and one for each gradient."""
    zimg, ztxt = pairs.zimg, pairs.ztxt
    n = len(ztxt)
    gradient = torch.zeros_like(ztxt)
    other = torch.zeros_like(zimg) if zimg.requires_grad else None
    # Tiles as large as siglit's: one n × n result would spend its time in memory.
    parts = list(tiles(n, n, n if at_once else None, ztxt.device, elementwise.compiling(n * n)))
    rows, columns = parts[0]
    room = ztxt.new_empty(rows.stop * columns.stop)
    for rows, columns in parts:
        shape = rows.stop - rows.start, columns.stop - columns.start
        tile = room[: shape[0] * shape[1]].view(shape)
        torch.mm(ztxt[rows], zimg[columns].T, out=tile)
        gradient[rows].addmm_(tile, zimg[columns])
        if other is not None:
            other[columns].addmm_(tile.T, ztxt[rows])
