"""Files of a cache, committed whole or not at all, and what a disk's refusal means in words.

Knows nothing of shards.
"""

import errno
import shutil
from pathlib import Path

from siglit.files import atomic_write


def commit(folder: Path, name: str, data: bytes | memoryview) -> None:
    """Write a file whole or not at all, durably.

    Raises:
        OSError: it could not be written; the text says why in words.
    """
    try:
        with atomic_write(folder / name) as file:
            file.write(data)
    except OSError as error:
        raise explained(error, folder, name, len(data)) from error


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
