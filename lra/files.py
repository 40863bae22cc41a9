"""What building records asks of the file system: a lock, durable writes, checksums, and errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from lra.errors import DataError

log = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def one_line(error: BaseException) -> str:
    """An error's text without line breaks, at most 200 characters."""
    return " ".join(str(error).split())[:200]


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


def sha256(path: Path) -> str:
    """Hexadecimal checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def not_writable(root: Path) -> Iterator[None]:
    """Turns a data folder that cannot be used into one line that names the option."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DataError(f"the disk of {root} is full: make room or set data.dir") from None
        raise DataError(f"cannot write to the data folder {root} ({error.strerror}): set data.dir to another") from None


@contextlib.contextmanager
def file_errors(folder: Path) -> Iterator[None]:
    """Turns files that cannot be read or written into one line; the writers in C++ have errors of their own."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reasons = {number: os.strerror(number) for number in _NO_ROOM}
        for number, reason in reasons.items():
            if (isinstance(error, OSError) and error.errno == number) or reason in str(error):
                raise DataError(
                    f"the disk is full ({reason}) while {folder} is built: make room or set data.dir"
                ) from error
        if isinstance(error, OSError) and error.filename is not None:
            raise DataError(f"{error.filename}: {error.strerror}, while {folder} is built") from error
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of one set of records; it falls with the process, however that ends."""
    import fcntl

    path = folder.parent / f".{folder.name}.lock"
    with not_writable(folder.parent):
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        said = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    file.seek(0)
                    log.warning("waiting for another process (%s), which builds %s", file.read() or "unknown", folder)
                    said = True
                time.sleep(0.2)
            except OSError as error:  # some network file systems have no locks
                raise DataError(f"cannot lock {path} ({error.strerror}): set data.dir to a local disk") from None
        file.truncate(0)
        file.write(f"pid {os.getpid()}")
        file.flush()
        yield
