"""Lets a process reuse the memory that it frees, where glibc would hand it back to the kernel.

glibc maps a block of more than 32 MiB afresh and unmaps it when it is freed. The activations of a tower are such
blocks, and the kernel clears all their pages again at every layer: for a convolution tower that is most of the time.
Knows nothing of tensors; does nothing with another C library, such as musl's or macOS's.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_DEFAULT_MMAP_MAX = 65_536
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_SETTINGS = ("mmap_threshold", "mmap_max", "trim_threshold")


@contextmanager
def reusing_freed_memory() -> Iterator[None]:
    """Keep freed memory for later allocations until this is left; also a decorator.

    The process then holds the most that it needed at once, and the gaps between blocks, until the end, when all that
    is free goes back to the kernel. Processes that are forked inside do the same.

    Changes nothing where the environment sets these thresholds (`MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`, …), and
    has no effect on an allocator that replaces glibc's, such as jemalloc.
    """
    libc = None if _set_by_environment() else _glibc()
    if libc is None:
        yield
        return
    # Not a higher M_MMAP_THRESHOLD: glibc before 2.35 refuses more than 32 MiB.
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # unlimited
    try:
        yield
    finally:
        # A threshold that was set no longer adapts to what is freed: these are the largest that glibc adapts to.
        libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        libc.malloc_trim(0)


def _set_by_environment() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(f"MALLOC_{s.upper()}_" in os.environ or f"glibc.malloc.{s}=" in tunables for s in _SETTINGS)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process if it is glibc."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # not POSIX, or nothing can be loaded into this process
        return None
    return libc if all(hasattr(libc, f) for f in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
