"""What building records asks of the file system: a lock, durable writes, checksums, and errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from chela.core.errors import DataError, UsageError

log = logging.getLogger(__name__)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or renamed in a folder where the file system can sync folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some of the network cannot
            raise
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Write ``data`` to a temporary file and move it to ``path`` in one stroke: it is whole, or the old one stays.

    Args:
        path: Where the file is to lie.
        data: What it is to hold.
        previous: Where the file that ``path`` holds now is kept, so that one torn file can never cost a run.

    Raises:
        UsageError: The disk is full or the folder is not writable; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(
            f"could not write {path} ({error.strerror}); what was saved before is kept: make room or set another "
            "folder, then run again"
        ) from None


def sha256(path: Path) -> str:
    """Return the checksum of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def file_errors(folder: Path) -> Iterator[None]:
    """Turn what hinders a build in ``folder`` into one line; the writers in C++ have errors of their own."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        for reason in map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
            if reason in str(error):
                raise DataError(
                    f"the disk is full ({reason}) while {folder} is built: make room or set data.dir"
                ) from None
        if isinstance(error, OSError):
            where = f"{error.filename or folder}: {error.strerror}"
            raise DataError(f"{where}, while {folder} is built; set data.dir to have it elsewhere") from error
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of one set of records; it falls with the process, however that ends."""
    from filelock import FileLock, Timeout

    path = folder.parent / f".{folder.name}.lock"
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.warning("waiting for another process (%s), which builds %s", path.read_text() or "unknown", folder)
        lock.acquire(poll_interval=0.2)
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        raise DataError(f"cannot lock {path} ({error}): set data.dir to a local disk that can be written") from None
    try:
        path.write_text(f"pid {os.getpid()}")
        yield
    finally:
        lock.release()
