"""Texts in files: mapped into memory where they lie, unpacked once where they are compressed."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import lzma
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from lra.errors import DataError
from lra.files import file_errors, locked, sync
from lra.schema import DataConfig

_CHUNK = 1 << 20
_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
PACKED = (*_OPENERS, ".zip")
"""Endings of what can be unpacked."""


class Span:
    """Symbols ``first`` … ``last`` − 1 of a file, which is mapped into memory by whoever reads it."""

    def __init__(self, path: Path, first: int, last: int, before: bytes) -> None:
        self._path, self._first, self._last, self._before = path, first, last, before

    def __len__(self) -> int:
        return self._last - self._first

    @cached_property
    def _mapped(self) -> np.ndarray:
        return np.memmap(self._path, np.uint8, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_mapped"}  # a copy would be the text

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return bytes, uint8; at −1 stands the symbol before the span, or what stands before a text."""
        found: np.ndarray = self._mapped[max(self._first + start, 0) : self._first + stop]
        return found if self._first + start >= 0 else np.concatenate([np.frombuffer(self._before, np.uint8), found])

    def counts(self) -> np.ndarray:
        """Return how often each byte occurs, int64 ``(256,)``."""
        starts = range(0, len(self), _CHUNK)
        parts = (self.read(start, min(start + _CHUNK, len(self))) for start in starts)
        return sum((np.bincount(part, minlength=256) for part in parts), np.zeros(256, np.int64))


def chunks(path: Path) -> Iterator[bytes]:
    """Yield a file piece by piece."""
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def check_utf8(name: str, path: Path) -> int:
    """Return the bytes of a file. Raises ``DataError`` where it is no UTF-8."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
    for chunk in (*chunks(path), b""):
        held = len(decoder.getstate()[0])  # of a character that the chunk before cut
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}: expected UTF-8 in {path}, got {error.object[error.start : error.start + 1]!r} at byte "
                f"{at - held + error.start:,}: convert it, as with `iconv -t utf-8`; a compressed text needs "
                "its ending .gz, .xz or .zip"
            ) from None
        at += len(chunk)
    return at


def unpacked(source: Path, names: Sequence[str], data: DataConfig, check: Callable[[Path], object]) -> list[Path]:
    """Return the files that a compressed one holds, unpacked under the data folder unless they are there."""
    stat = source.stat()
    mark = hashlib.sha256(f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:10]
    folder = data.folder() / "texts" / f"{source.name}-{mark}"
    paths = [folder / name for name in names]
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            for path in paths:
                if not path.exists():
                    _unpack(source, path, check)
    return paths


def _unpack(source: Path, path: Path, check: Callable[[Path], object]) -> None:
    """Write one file of a compressed one; it is checked before it has its name."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _opened(source, path.name) as packed, open(temporary, "wb") as file:
            shutil.copyfileobj(packed, file, _CHUNK)
        sync(temporary)
        check(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile) as error:
        raise DataError(f"{source} cannot be unpacked ({error}): it is truncated or another file") from None
    finally:
        temporary.unlink(missing_ok=True)


def _opened(source: Path, name: str) -> IO[bytes]:
    if source.suffix != ".zip":
        opened: IO[bytes] = _OPENERS[source.suffix](source)
        return opened
    archive = zipfile.ZipFile(source)
    files = [member.filename for member in archive.infolist() if not member.is_dir()]
    member = next((file for file in files if Path(file).name == name), files[0] if len(files) == 1 else None)
    if member is None:
        raise DataError(f"{source}: expected {name} in the archive, or one file alone, got {', '.join(files)[:200]}")
    return archive.open(member)
