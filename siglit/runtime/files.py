"""Files that are written whole or not at all, and read only where they are plain files.

Knows nothing of what is in them. A temporary file is `NAME.tmp-RANDOM` beside its NAME and locked (flock) as long as
its writer lives; so a leftover of a killed writer can be told from the file of a live one, on this machine and on the
others that share the folder, whatever their process ids are.
"""

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

MAX_BYTES = 1 << 30
"""Largest file that is read whole, 1 GiB: an image, a text in a tar, a tokenizer, a list of class names."""
MAX_LISTING_BYTES = 64 << 30
"""Largest listing, 64 GiB: its rows are kept in memory, more than the file takes."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


@contextlib.contextmanager
def atomic_write(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Give a file to write to, which takes the place of `path` when the block ends, durably; none if it raises.

    A temporary file, fsync, rename, fsync of the folder. Whoever writes by name writes to the file's `name`. A kill
    leaves the temporary file, which the next writer of `path` deletes; it deletes nothing that goes by another name.

    Args:
        path: in a folder that is there.
        keep: the name that what was at `path` before is given, immediately before it is replaced.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    _remove_unlocked(path.with_name(name) for name in _names(path.parent) if _is_own(name, path.name))
    file = _open_temporary(path)
    try:
        # Open, and with it locked, until it has its name.
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(file.name, path)
        fsync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file.name)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all, durably.

    Raises:
        OSError: it could not be written; the text says why in words.
    """
    try:
        with atomic_write(path) as file:
            file.write(data)
    except OSError as error:
        raise explained(error, path.parent, path.name, len(data)) from error


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


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    with atomic_write(path) as file:
        file.write(f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode())


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leftovers(folder: Path, names: str) -> list[Path]:
    """Temporary files of the files that the pattern `names` matches, of live writers and of killed ones.

    As `atomic_write` names them, or as earlier versions did: NAME.tmp.PID-RANDOM, NAME.tmp, STEM.PID.tmp, STEM.tmp.
    """
    stem = os.path.splitext(names)[0]
    patterns = (f"{names}.tmp-*", f"{names}.tmp.*", f"{names}.tmp", f"{stem}.[0-9]*.tmp", f"{stem}.tmp")
    found = [name for name in _names(folder) if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    return [Path(folder) / name for name in sorted(found)]


def remove_leftovers(folder: Path, names: str) -> None:
    """Delete the `leftovers` that no live writer holds; where the file system has no locks, none."""
    _remove_unlocked(leftovers(folder, names))


def _remove_unlocked(paths: Iterable[Path]) -> None:
    for path in paths:
        # r+: some network file systems lock a file only for who may write it.
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _names(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if ".tmp" in name]
    except OSError:  # not there, or not to be listed: then whoever writes says so
        return []


def _is_own(name: str, target: str) -> bool:
    """Whether `_open_temporary` makes such names for the target; in a folder of results, others may be somebody's."""
    return name.startswith(target) and re.fullmatch(r"\.tmp-[0-9a-f]{16}", name[len(target) :]) is not None


def open_regular(path: Path | str) -> BufferedReader:
    """Open a file for reading unless it is something that could be read forever, or waited for.

    Raises:
        OSError: there is none, it cannot be read, or it is a folder, pipe, device or socket; `strerror` says which.
    """
    # Without O_NONBLOCK a pipe would be waited for before anyone could look at what it is.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_kind(os.fstat(descriptor).st_mode, path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: Path | str) -> None:
    """Look at a file, or at all that lie in a folder, before a library opens them by name.

    Raises:
        OSError: it is not there, or is neither a regular file nor a folder of such, folders in it left aside.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISDIR(mode):
        _check_kind(mode, path)
        return
    for name in sorted(os.listdir(path)):
        inner = os.path.join(path, name)
        # A link that leads nowhere is no file to anybody.
        if os.path.exists(inner) and not os.path.isdir(inner):
            _check_kind(os.stat(inner).st_mode, inner, f"{name} in it")


def read_regular(path: Path | str, limit: int = MAX_BYTES) -> bytes:
    """Return what is in a regular file of at most `limit` bytes.

    Raises:
        OSError: as `open_regular`, or it is larger.
    """
    with open_regular(path) as file:
        check_size(os.fstat(file.fileno()).st_size, limit, path)
        return file.read()


def check_size(size: int, limit: int, path: Path | str) -> None:
    """Refuse to read more than `limit` bytes at one go.

    Raises:
        OSError: it is more.
    """
    if size > limit:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than {limit:,}", str(path))


def _check_kind(mode: int, path: Path | str, subject: str = "it") -> None:
    if not stat.S_ISREG(mode):
        what = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, f"{subject} is {what}, not a regular file", str(path))


def _open_temporary(path: Path) -> BinaryIO:
    while True:
        temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(8)}")
        # Readable too: where a file system has no fallocate, glibc's stand-in for it reads what is there.
        file = open(temporary, "x+b")  # noqa: SIM115 - its writer closes it
        with contextlib.suppress(OSError):  # no locks here: then nobody deletes leftovers either
            fcntl.flock(file, fcntl.LOCK_EX)
        # Who deletes leftovers may have come between the two lines.
        if temporary.exists():
            return file
        file.close()


def file_hash(path: str) -> str:
    """BLAKE2b of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
