"""Checkpoints that are whole or absent, and that are never unpickled."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from chela.errors import UsageError
from lra.files import sync

FORMAT_VERSION = 1

# Older format: how to read it now, or (as text) why it can no longer be read.
_OLDER: dict[int, str] = {}


class TornError(UsageError):
    """A file that is not, or no longer, a checkpoint: an older one may still be whole."""


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
            f"could not write {path} ({error.strerror}); what was saved before is kept: free some space, then resume"
        ) from None


def save(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint in one stroke."""
    buffer = io.BytesIO()  # so that a full disk is an OSError of ours, and nothing but bytes is left to go wrong
    torch.save({"format_version": FORMAT_VERSION, **state}, buffer)
    write_whole(path, buffer.getvalue(), previous)


def load(path: Path, keys: tuple[str, ...], identity: str) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are accepted (``weights_only=True``).

    Args:
        path: The file.
        keys: What it must hold.
        identity: Fingerprint of the configuration that it must come from.

    Raises:
        TornError: Absent, torn or foreign.
        UsageError: Of another format version or another configuration.
    """
    if not path.is_file():
        raise TornError(f"expected a checkpoint at {path}, there is none")
    state = _read(path)
    if not isinstance(state, dict) or "format_version" not in state:
        raise TornError(f"expected a checkpoint of this project at {path}, got one without a format version")
    version = state["format_version"]
    if version != FORMAT_VERSION:
        reason = _OLDER.get(version, "use the version of chela that wrote it")
        raise UsageError(f"expected format version {FORMAT_VERSION} in {path}, got {version!r}; {reason}")
    missing = [key for key in (*keys, "fingerprint") if key not in state]
    if missing:
        raise TornError(f"expected a checkpoint of this project at {path}, it lacks {', '.join(missing)}")
    if state["fingerprint"] != identity:
        raise UsageError(
            f"expected a checkpoint of this run's configuration ({identity}) at {path}, got one of another "
            f"({state['fingerprint']}); put back the run's own file"
        )
    return state


def _read(path: Path) -> Any:
    try:
        # torch itself does not look at the checksums, and what is no archive it would read as plain pickle
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise ValueError(f"{bad} has another checksum than was written")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can make the reader raise anything
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise TornError(
            f"expected a whole checkpoint of this project at {path}, it is torn or foreign ({reason})"
        ) from None
