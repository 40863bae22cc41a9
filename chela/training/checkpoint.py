"""Checkpoints that are whole or absent, and that are never unpickled."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from chela.errors import UsageError

FORMAT_VERSION = 1


def write_whole(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    """Call ``write(temporary path)``, then move the file to ``path`` in one stroke: it is whole, or the old one stays.

    Args:
        path: Where the file is to lie.
        write: Writes it to the path that it is given.
        previous: Where the file that ``path`` holds now is kept, so that one torn file can never cost a run.

    Raises:
        UsageError: The disk is full or the folder is not writable; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0][:120]
        raise UsageError(
            f"could not write {path} ({reason}); the last good file is kept: free some space, then resume"
        ) from None


def save(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint in one stroke."""
    write_whole(path, lambda temporary: torch.save({"format_version": FORMAT_VERSION, **state}, temporary), previous)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are accepted (``weights_only=True``).

    Raises:
        UsageError: Absent, torn, foreign, or of another format version.
    """
    if not path.is_file():
        raise UsageError(f"expected a checkpoint at {path}, there is none")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UsageError(
            f"expected a whole checkpoint of this project at {path}, it is torn or foreign ({reason})"
        ) from None
    if not isinstance(state, dict) or "format_version" not in state:
        raise UsageError(f"expected a checkpoint of this project at {path}, got one without a format version")
    if state["format_version"] != FORMAT_VERSION:
        raise UsageError(
            f"expected format version {FORMAT_VERSION} in {path}, got {state['format_version']}; "
            "use the version of chela that wrote it"
        )
    return state


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
