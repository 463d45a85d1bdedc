"""The precision of float32 products within a block. Knows no towers, no losses and no settings of its own."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set the precision of float32 matrix products and convolutions, and restore the earlier one afterwards.

    By default torch computes convolutions of float32 in TF32 on CUDA, such as that of a ViT's patches. With TF32 a
    cosine is off by up to 1e-3, and a logit at scale 100 by a tenth.

    Args:
        precision: as in `torch.set_float32_matmul_precision`: "highest" for float32, "high" for TF32.
    """
    saved = _saved()
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    try:
        yield
    finally:
        for restore in saved:
            restore()


def _saved() -> list[Callable[[], None]]:
    """What restores the present settings.

    Torch has two ways to set them, and refuses to read those of the older one once the newer one was used. Each
    changes what the other reads, so that both are restored.
    """
    backends: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        torch.backends.cudnn.rnn,
    )
    restores: list[Callable[[], None]] = []
    with contextlib.suppress(RuntimeError):
        restores.append(partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    with contextlib.suppress(RuntimeError):
        restores.append(partial(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32))
    return restores + [partial(setattr, backend, "fp32_precision", backend.fp32_precision) for backend in backends]
