"""Files that are there whole or not at all, and what a disk's refusal means in words.

Knows nothing of shards.
"""

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path


def commit(folder: Path, name: str, data: bytes | memoryview) -> None:
    """Write a file whole or not at all, durably: a temporary file, fsync, rename, fsync of the folder.

    Raises:
        OSError: it could not be written; the text says why in words.
    """
    # The process id alone is not unique where several machines share the folder.
    temporary = folder / f"{name}.tmp.{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with open(temporary, "xb", buffering=0) as file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        os.replace(temporary, folder / name)
        fsync_folder(folder)
    except OSError as error:
        raise explained(error, folder, name, len(data)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explained(error: OSError, folder: Path, name: str, size: int) -> OSError:
    """Put an error of the disk, keeping its type, in words that say what to do."""
    reason = error.strerror or str(error)
    advice = "see to that and run again"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        reason = f"the disk or your quota is full ({free / 1e6:.1f} MB free)"
        advice = "make room and run again"
    elif error.errno == errno.EFBIG:
        reason, advice = "files may not become that large here", "raise `ulimit -f` or make smaller shards"
    text = f"{name} ({size / 1e6:.1f} MB) could not be written into {folder}: {reason}; {advice}, nothing is lost"
    return OSError(error.errno, text)
