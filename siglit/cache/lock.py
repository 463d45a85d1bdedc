"""One writer per cache folder: a lock that ends with the process that holds it, however that ends.

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
from siglit.runtime.files import explained

LOCK_NAME = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_held: set[int] = set()


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other writers out of a folder, which is made if it is not there.

    Raises:
        CacheError: another process writes there; the text names it.
        OSError: the folder cannot be written.
    """
    path = Path(folder) / LOCK_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
    except OSError as error:
        raise explained(error, path.parent, path.name, 0) from error
    _held.add(descriptor)
    try:
        yield
    finally:
        # Unlinked while it is held: whoever waits for this file finds that it has lost its name, and takes a new one.
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


def _acquire(path: Path) -> int:
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
                    f"{path.parent} is being written by {who}; wait until it is done, or stop it"
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
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _let_go_in_child() -> None:
    # A forked worker that outlives its killed parent for some seconds would hold the lock on.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
