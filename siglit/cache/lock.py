"""One writer per cache folder: a lock that ends with the process that holds it, whatever ends that.

Knows nothing of shards. Readers take no lock.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from siglit.cache.format import CacheError
from siglit.runtime.files import explain_write_error

LOCK_NAME = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_held: set[int] = set()


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the writer's lock of a folder, which is created if it does not exist.

    Raises:
        CacheError: another process holds the lock; the message names it.
        OSError: the folder cannot be written.
    """
    path = Path(folder) / LOCK_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
    except OSError as error:
        raise explain_write_error(error, path.parent, path.name, 0) from error
    _held.add(descriptor)
    try:
        yield
    finally:
        # Deleted while it is locked: a process that has just opened it sees that the name is gone and opens a new one.
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """Open and lock the file, write the holder into it, and return its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace")
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                who = holder or "another process"
                raise CacheError(
                    f"{path.parent} is being written by {who}; wait until that is done, or stop it"
                ) from None
            if error.errno not in _NO_LOCKS:
                raise
            logging.getLogger(__name__).warning("%s: no file locks here; start one writer at a time", path.parent)
        if _still_named(descriptor, path):
            break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    os.write(descriptor, f"host {socket.gethostname()}, process {os.getpid()}, since {since}".encode())
    return descriptor


def _still_named(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`, not deleted by its last holder."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _release_in_child() -> None:
    # Otherwise a forked worker that outlives its killed parent for some seconds would keep the lock.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)
