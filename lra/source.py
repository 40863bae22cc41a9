"""Where a task's data comes from: what the user has, which is never changed, or a download.

A download says its size and address first, and is whole and checked before it has its name.
"""

from __future__ import annotations

import hashlib
import logging
import lzma
import os
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chela.core.errors import DataError
from chela.core.files import sha256
from chela.core.options import option

log = logging.getLogger(__name__)

DEPTH = 3  # folders below data.root that are searched
_TIMEOUT = 30.0  # seconds without a byte


@dataclass
class DataConfig:
    """Where data lies, where it comes from, how batches are made."""

    dir: str = option("", "folder for prepared records; empty: $CHELA_DATA, else ~/.cache/chela", identity=False)
    root: str | None = option(None, "folder or archive of your own to take the data from", identity=False)
    source: str = option("auto", "'auto': the task's own data; of retrieval also 'imdb', not LRA's")
    download: bool = option(True, "fetch data that is not there; false: say what is missing", identity=False)
    validation: str = option(
        "holdout", "'holdout': data kept apart; 'test': the test set, as some papers do", choices=("holdout", "test")
    )
    processes: int = option(0, "parallel workers that build records; 0: one per core", ge=0, le=1024, identity=False)
    workers: int = option(0, "loader workers; 0: load in the training process", ge=0, le=256, identity=False)
    carry: bool = option(
        False, "texts: read in order, the network's state carried from window to window", neutral=False
    )
    pool: int = option(8, "batches per bucketing pool: larger pools pad less and shuffle less", ge=1, le=100_000)

    def split(self, name: str) -> str:
        """Return the split that is read as ``name``: the option ``validation`` says which one validates."""
        return "test" if (name, self.validation) == ("validation", "test") else name

    def folder(self) -> Path:
        """Return the folder for prepared records, with the environment and ``~`` resolved."""
        folder = self.dir or os.environ.get("CHELA_DATA") or "~/.cache/chela"
        return Path(os.path.expanduser(folder))  # leaves an unknown ~user alone, where Path.expanduser raises


@dataclass(frozen=True)
class Remote:
    """A file that can be fetched: its name here, its address, its bytes and its SHA-256, hexadecimal."""

    file: str
    url: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Layout:
    """One way in which users have the files of a data set."""

    name: str  # for messages, "the extracted tree"
    pattern: str  # a file of it, relative to a folder; may hold ``*``
    remote: Remote | None = None  # where that file can be fetched, if it can be


def given_root(task: str, data: DataConfig) -> Path | None:
    """Return what ``data.root`` names, None where it is not set. Raises ``DataError`` if it is not there."""
    if data.root is None:
        return None
    root = Path(os.path.expanduser(data.root))
    if not root.exists():
        raise DataError(f"{task}: data.root is {root}, which does not exist: set it to one that does")
    return root


def digest(source: Path) -> str:
    """Return ten hexadecimal digits of where a source lies; its content would have to be read whole at every start."""
    return hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:10]


def locate(task: str, data: DataConfig, layouts: Sequence[Layout]) -> tuple[Layout, Path]:
    """Return the first layout that is there, and its file; or fetch one that can be.

    Layouts are tried in order, under ``data.root`` if it is set, else in the data folder's ``downloads``.

    Raises:
        DataError: Naming what is missing, where it was looked for, and what to do.
    """
    downloads = data.folder() / "downloads"
    root = given_root(task, data) or downloads
    for layout in layouts:
        if found := _find(root, layout.pattern):
            if layout.remote:
                verify(found, layout.remote)
            return layout, found
    wanted = "; ".join(f"{layout.name} ({layout.pattern})" for layout in layouts)
    if data.root is not None:
        raise DataError(f"{task}: {root} holds none of: {wanted}: set data.root to a folder or archive that does")
    for layout in layouts:
        if layout.remote:
            return layout, fetch(task, layout.remote, downloads, allowed=data.download)
    raise DataError(
        f"{task}: this data cannot be fetched for you; expected one of: {wanted}: put it into {downloads}, or run "
        f"`chela prepare task={task} data.root=FOLDER`"
    )


def _find(root: Path, pattern: str) -> Path | None:
    """Return the file of a pattern at ``root`` or up to ``DEPTH`` folders below; the last of several."""
    if root.is_file():
        return root if root.match(pattern) else None
    bases = [root, *([root.resolve().parent] if root.resolve().match(pattern.split("/")[0]) else [])]  # aclImdb itself
    for deeper in ("*/" * depth + pattern for depth in range(DEPTH + 1)):
        if found := sorted(path for base in bases for path in base.glob(deeper) if path.is_file()):
            return found[-1]
    return None


def verify(path: Path, remote: Remote) -> None:
    """Compare a file with what it should be. Raises ``DataError`` naming both checksums."""
    if (size := path.stat().st_size) != remote.size:
        raise DataError(f"{path} has {size:,} bytes, expected {remote.size:,}: it is truncated or another file")
    if (found := sha256(path)) != remote.sha256:
        raise DataError(f"{path} has SHA-256 {found}, expected {remote.sha256}: it is damaged or another file")


def check_content(task: str, parts: Iterable[Any], expected: str, archive: Remote) -> None:
    """Compare the SHA-256 of a data set's parts, one after another, with what it should be. Raises ``DataError``."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    if whole.hexdigest() != expected:
        raise DataError(
            f"{task}: this is not the content of the release (digest {whole.hexdigest()[:12]}…, expected "
            f"{expected[:12]}…): fetch {archive.url} again"
        )


def fetch(task: str, remote: Remote, folder: Path, *, allowed: bool = True) -> Path:
    """Download a file into a folder and return its path.

    Raises:
        DataError: Without network, or when what came is not what was expected (it is removed).
    """
    target = folder / remote.file
    by_hand = (
        f"get {remote.url} ({remote.size / 1e6:,.0f} MB) another way and put it at {target}, or run "
        f"`chela prepare task={task} data.root=FOLDER` with the folder that has it"
    )
    if not allowed:
        raise DataError(f"{task}: {remote.file} is not at {target} and data.download is false: {by_hand}")
    import pooch  # imported here: few runs fetch, and --help must not wait
    import requests

    log.warning("fetching %s (%.0f MB) from %s to %s", remote.file, remote.size / 1e6, remote.url, folder)
    pooch.get_logger().setLevel(logging.WARNING)
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=_TIMEOUT)
    try:
        pooch.retrieve(remote.url, f"sha256:{remote.sha256}", remote.file, folder, downloader=downloader)
    except requests.RequestException as error:
        raise DataError(f"{task}: {remote.file} could not be fetched ({error}): {by_hand}") from None
    except ValueError as error:  # another checksum
        raise DataError(f"{task}: what {remote.url} sent is not the expected file ({error}): {by_hand}") from None
    return target


def members(source: Path, wanted: Callable[[str], Any]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the wanted files of a folder or a tar archive; nothing is unpacked to disk.

    Raises:
        DataError: The archive is truncated or damaged, or the file is none.
    """
    if source.is_dir():
        names = ((path, path.relative_to(source.parent).as_posix()) for path in sorted(source.rglob("*.*")))
        yield from ((name, path.read_bytes()) for path, name in names if wanted(name))
        return
    try:
        with tarfile.open(source, "r|*") as tar:
            for member in tar:
                if member.isfile() and wanted(member.name):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield member.name, file.read()
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise DataError(f"{source} cannot be read ({error}): it is truncated or no archive; fetch it again") from None
