"""Texts in files, and windows of them as records; files are mapped into memory, compressed ones unpacked once."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from chela.core.errors import DataError
from chela.core.files import make_folder, sync
from lra.batches import GOLDEN, key, mix
from lra.source import DataConfig
from lra.tasks.base import IGNORED, Encoded, Label, Records

_CHUNK = 1 << 20
_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
PACKED = (*_OPENERS, ".zip")


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


class Windows(Records):
    """Windows of a text: record i holds the symbols from i·stride on as targets, and as input the one before each.

    ``table`` has the id of each byte; the last window of a span may be shorter. With ``once`` a symbol is a target in
    one record only, the first that has it.
    """

    def __init__(self, table: np.ndarray, span: Span, window: int, stride: int, once: bool) -> None:
        self._table, self._span, self._window, self._stride, self._once = table, span, window, stride, once
        self._number = 1 + max(0, -(-(len(span) - window) // stride))

    def __len__(self) -> int:
        return self._number

    def read(self, indices: Sequence[int] | np.ndarray) -> list[tuple[Encoded, Label]]:
        """Return (input, targets) of several records."""
        records: list[tuple[Encoded, Label]] = []
        for i in map(int, indices):
            first = i * self._stride
            ids = self._table[self._span.read(first - 1, min(first + self._window, len(self._span)))]
            targets = ids[1:].astype(np.int64)
            if self._once and i:
                targets[: self._window - self._stride] = IGNORED
            records.append((ids[:-1], targets))
        return records

    def lengths(self) -> np.ndarray:
        """Return the length of every record, int64 ``(N,)``; of equal ones in the memory of one."""
        lengths = np.broadcast_to(np.int64(self._window), self._number)
        last = len(self._span) - (self._number - 1) * self._stride
        if last < self._window:
            lengths = lengths.copy()
            lengths[-1] = last
        return lengths

    def batch(self, size: int, pool: int, seed: int, step: int) -> np.ndarray:
        """Return windows drawn at random, each apart from the others, from (seed, step) alone."""
        words = mix(np.arange(size, dtype=np.uint64) * GOLDEN + key(seed, "window", step))
        return (words % np.uint64(len(self))).astype(np.int64)

    def ordered(self, size: int, step: int) -> tuple[np.ndarray, bool]:
        """Return the windows of a step, row b reading its part of the text on, and whether that begins anew.

        The text is cut into as many equal parts as there are rows; what is left at a part's end, less than a window,
        is not read.
        """
        part = len(self._span) // size
        if not (steps := part // self._window):
            raise DataError(
                f"data.carry: expected a text of at least a window of {self._window:,} for each of {size} rows, got "
                f"{len(self._span):,} symbols; lower trainer.batch_size or task.window"
            )
        starts: np.ndarray = np.arange(size) * part + step % steps * self._window
        return starts // self._stride, step % steps == 0

    def epochs(self, records: int) -> float:
        """Return how many times the text's number of symbols these windows read: random windows overlap."""
        return records * self._window / len(self._span)

    def majority_accuracy(self) -> float:
        """Return the share of the most frequent symbol."""
        return float(self._span.counts().max() / len(self._span))


def check_utf8(name: str, path: Path) -> None:
    """Raise ``DataError`` where a file is no UTF-8, naming the line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                got = f"{name}: expected UTF-8 in {path}, got {line[error.start :][:1]!r} in line {number:,}"
                remedy = "convert it, as with `iconv -t utf-8`; a compressed text needs its ending .gz, .xz or .zip"
                raise DataError(f"{got}: {remedy}") from None


def unpacked(source: Path, names: Sequence[str], data: DataConfig, check: Callable[[Path], object]) -> list[Path]:
    """Return the files that a compressed one holds, unpacked under the data folder unless they are there.

    A file is checked before it has its name.
    """
    stat = source.stat()
    mark = hashlib.sha256(f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:10]
    folder = data.folder() / "texts" / f"{source.name}-{mark}"
    paths = [folder / name for name in names]
    make_folder(folder, "data.dir")
    from filelock import FileLock  # imported here: few runs unpack

    with FileLock(folder.parent / f".{folder.name}.lock"):
        for path in paths:
            temporary = path.with_name(f".{path.name}.tmp")
            if path.exists():
                continue
            try:
                with _opened(source, path.name) as packed, open(temporary, "wb") as file:
                    shutil.copyfileobj(packed, file, _CHUNK)
                sync(temporary)
                check(temporary)
                os.replace(temporary, path)
                sync(folder)
            except (EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile) as error:
                raise DataError(f"{source} cannot be unpacked ({error}): it is truncated or another file") from None
            finally:
                temporary.unlink(missing_ok=True)
    return paths


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
