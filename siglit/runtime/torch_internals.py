"""What siglit relies on in torch beyond its documented interface: one function for each reach.

`tests/runtime/test_torch_internals.py` has a test for each of them, which fails when torch changes what the function
relies on. Those of Lightning are `training/lightning_internals.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader


def end_workers(iterator: Any) -> None:
    """End the worker processes of a DataLoader's iterator and wait for them.

    Dropping the iterator does the same, but not while a traceback holds it.
    """
    iterator._shutdown_workers()


def end_persistent_workers(loader: DataLoader) -> None:
    """End the workers that a DataLoader keeps between its iterators, if any; the next iterator starts new ones."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        end_workers(iterator)
        loader._iterator = None


def graph_is_kept() -> bool:
    """Whether the backward pass that is running may be repeated (`retain_graph`); True where torch does not say."""
    keeps: Callable[[], bool] | None = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is None or keeps()


def storage_id(storage: torch.UntypedStorage) -> int:
    """The same number for every Python object that stands for one storage, as long as the storage lives."""
    return int(storage._cdata)
