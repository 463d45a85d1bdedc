"""Files that are written whole or not at all, and read only if they are regular files; hashes of files.

Knows nothing of their content. A temporary file is called `NAME.tmp-RANDOM`, lies beside NAME and is locked (flock)
while its writer lives. The lock distinguishes the leftover of a killed writer from the file of a live one, on this
machine and on others that share the folder, whatever their process ids are.
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
from typing import Any, BinaryIO, Literal

MAX_BYTES = 1 << 30
"""Largest file that is read into memory, 1 GiB: an image, a text in a tar, a tokenizer, a list of class names."""
MAX_LISTING_BYTES = 64 << 30
"""Largest listing, 64 GiB; its rows take more memory than the file takes disk."""
_BLOCK, _DIGEST_BYTES = 1 << 20, 16

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


@contextlib.contextmanager
def atomic_write(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces `path`, durably, when the block ends; if the block raises, nothing changes.

    The steps are: write, fsync, rename, fsync of the folder. A library that opens files by name is given the yielded
    file's `name`. A killed writer leaves its temporary file, which the next writer of `path` deletes; it deletes no
    file of another name.

    Args:
        path: file in an existing folder.
        keep: where the previous file at `path` is moved immediately before it is replaced.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    _remove_unlocked(path.with_name(name) for name in _temporary_names(path.parent) if _belongs_to(name, path.name))
    file = _open_temporary(path)
    try:
        # It stays open, and therefore locked, until it has its final name.
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
        OSError: the file could not be written; the message says why and what to do.
    """
    try:
        with atomic_write(path) as file:
            file.write(data)
    except OSError as error:
        raise explain_write_error(error, path.parent, path.name, len(data)) from error


def explain_write_error(error: OSError, folder: Path, name: str, size: int) -> OSError:
    """Return an error of the same type whose message says what to do about the failed write of `size` bytes."""
    reason = error.strerror or str(error)
    advice = "fix this and rerun"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        reason = f"the disk or your quota is full ({free / 1e6:.1f} MB free)"
        advice = "free some space and rerun"
    elif error.errno == errno.EFBIG:
        reason, advice = "the process may not write files that large", "raise `ulimit -f` or write smaller files"
    problem = f"{name} ({size / 1e6:.1f} MB) could not be written into {folder}: {reason}"
    return OSError(error.errno, f"{problem}; {advice}; completed work is kept")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, UTF-8 with an indent of 2, whole or not at all."""
    with atomic_write(path) as file:
        file.write(f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode())


def fsync_folder(folder: Path) -> None:
    """Make the file names in a folder durable: creations, renames and deletions."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leftovers(folder: Path, names: str) -> list[Path]:
    """Temporary files, of live and of killed writers, of the files that the glob pattern `names` matches.

    They are named as by `atomic_write`, or as by earlier versions: NAME.tmp.PID-RANDOM, NAME.tmp, STEM.PID.tmp,
    STEM.tmp.
    """
    stem = os.path.splitext(names)[0]
    patterns = (f"{names}.tmp-*", f"{names}.tmp.*", f"{names}.tmp", f"{stem}.[0-9]*.tmp", f"{stem}.tmp")
    matches = (name for name in _temporary_names(folder) if any(fnmatch.fnmatchcase(name, each) for each in patterns))
    return [Path(folder) / name for name in sorted(matches)]


def remove_leftovers(folder: Path, names: str) -> None:
    """Delete the `leftovers` that no live writer has locked; none where the file system has no locks."""
    _remove_unlocked(leftovers(folder, names))


def _remove_unlocked(paths: Iterable[Path]) -> None:
    for path in paths:
        # r+: some network file systems grant a lock only to a writer.
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _temporary_names(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if ".tmp" in name]
    except OSError:  # missing or not readable: the following write reports it
        return []


def _belongs_to(name: str, target: str) -> bool:
    """Whether `_open_temporary` chooses such names for the target; a user's file may have a similar one."""
    return name.startswith(target) and re.fullmatch(r"\.tmp-[0-9a-f]{16}", name[len(target) :]) is not None


def open_regular(path: Path | str) -> BufferedReader:
    """Open a regular file for reading; refuse pipes, devices and sockets, which could block forever.

    Raises:
        OSError: there is no such file, it cannot be read, or it is not a regular file; `strerror` says which.
    """
    check_name(path)
    # Without O_NONBLOCK, opening a pipe waits for its writer before its kind can be checked.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_kind(os.fstat(descriptor).st_mode, path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_name(path: Path | str) -> None:
    """Refuse a path that no file can have, for which Python raises a ValueError of its own.

    Raises:
        OSError: the path has a null character, or half of a surrogate pair that stands for no byte.
    """
    try:
        is_name = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise OSError(errno.EINVAL, "no file has such a name: it has a null character or invalid Unicode", str(path))


def check_regular(path: Path | str) -> None:
    """Check a file, or all files directly in a folder, before a library opens them by name; subfolders are skipped.

    Raises:
        OSError: the path does not exist, or it or a file in it is not a regular file; `strerror` says which.
    """
    check_name(path)
    mode = os.stat(path).st_mode
    if not stat.S_ISDIR(mode):
        _check_kind(mode, path)
        return
    for name in sorted(os.listdir(path)):
        inner = os.path.join(path, name)
        # A broken link cannot be opened by a library either.
        if os.path.exists(inner) and not os.path.isdir(inner):
            _check_kind(os.stat(inner).st_mode, inner, f"{name} in it")


def read_regular(path: Path | str, limit: int = MAX_BYTES) -> bytes:
    """Content of a regular file of at most `limit` bytes.

    Raises:
        OSError: as `open_regular`, or the file is larger than `limit`.
    """
    with open_regular(path) as file:
        check_size(os.fstat(file.fileno()).st_size, limit, path)
        return file.read()


def check_size(size: int, limit: int, path: Path | str) -> None:
    """Refuse to read more than `limit` bytes at once.

    Raises:
        OSError: `size` is more than `limit`.
    """
    if size > limit:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than {limit:,}", str(path))


def _check_kind(mode: int, path: Path | str, subject: str = "it") -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, f"{subject} is {kind}, not a regular file", str(path))


def _open_temporary(path: Path) -> BinaryIO:
    while True:
        temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(8)}")
        # Readable too: where a file system has no fallocate, glibc's replacement for it reads the file.
        file = open(temporary, "x+b")  # noqa: SIM115 - the writer closes it
        with contextlib.suppress(OSError):  # no locks: then no leftovers are deleted either
            fcntl.flock(file, fcntl.LOCK_EX)
        # Another process may have deleted it as a leftover before it was locked.
        if temporary.exists():
            return file
        file.close()


def append_checksum(file: BinaryIO) -> None:
    """Append the BLAKE2b of all of an open file's bytes, 16 bytes, for `has_checksum`; formats with a length ignore it.

    Call it in the block of `atomic_write`, after the last byte of the content.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    file.write(_digest_of_next(file, size))


def has_checksum(path: Path | str) -> bool:
    """Tell whether a file ends with the checksum of what is before it; reads every byte.

    Raises:
        OSError: as `open_regular`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
        return size >= 0 and _digest_of_next(file, size) == file.read()


def _digest_of_next(file: BinaryIO, size: int) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    while size > 0 and (block := file.read(min(size, _BLOCK))):
        digest.update(block)
        size -= len(block)
    return digest.digest()


def file_hash(path: Path | str, algorithm: Literal["blake2b", "sha256"] = "blake2b") -> str:
    """Hash of a file's bytes in hexadecimal: BLAKE2b of 16 bytes (32 digits) or SHA-256 (64 digits).

    Raises:
        OSError: as `open_regular`.
    """
    with open_regular(path) as file:
        new = hashlib.sha256 if algorithm == "sha256" else lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)
        return hashlib.file_digest(file, new).hexdigest()
