"""One line for a bus error (SIGBUS), which otherwise ends the process without a word.

The kernel sends it to a process that reads a memory-mapped file beyond the file's present end, or where the disk fails.
Knows nothing of what is mapped.
"""

import ctypes
import os
import signal
from collections.abc import Callable

_explanations: list[Callable[[], str]] = []


def explain_bus_errors(explanation: Callable[[], str]) -> None:
    """Add a function that names a damaged file that this process has mapped, or returns "".

    At a bus error the first explanation is written to stderr and the process ends with status 1. One that nobody
    explains ends it as the system does. Each call installs the handler again: Lightning, which cannot see it, sets the
    system's own when a training ends.
    """
    if not hasattr(signal, "SIGBUS"):  # Windows
        return
    ctypes.CDLL(None).signal(signal.SIGBUS, _handler)
    if explanation not in _explanations:
        _explanations.append(explanation)


def _end(_: int) -> None:
    # Python's own handlers run after the instruction, which would fail for ever; this one runs within it. No lock can
    # be held here, as the instruction is a read of the map.
    text = ""
    try:
        text = next(filter(None, (explanation() for explanation in _explanations)), "")
    finally:
        if text:
            os.write(2, f"siglit: {text}\n".encode())
            os._exit(1)
        # Nobody's file here is shorter than it was: the process ends as it would without this handler.
        ctypes.CDLL(None).signal(signal.SIGBUS, None)
        os.kill(os.getpid(), signal.SIGBUS)


_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end)
