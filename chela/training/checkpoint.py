"""Checkpoints that are whole or absent, and that are never unpickled."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from chela.config import first_line
from chela.core.errors import UsageError
from chela.core.files import write_whole

FORMAT_VERSION = 2
READ = (1, 2)  # of version 1 the weights can be scored; a run that was begun with it goes on with the chela that did


class TornError(UsageError):
    """A file that is not, or no longer, a checkpoint: an older one may still be whole."""


def save(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint in one stroke."""
    buffer = io.BytesIO()  # so that a full disk is an OSError of ours, and nothing but bytes is left to go wrong
    torch.save({"format_version": FORMAT_VERSION, **state}, buffer)
    write_whole(path, buffer.getvalue(), previous)


def load(path: Path, keys: tuple[str, ...], identities: Collection[str]) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are accepted (``weights_only=True``).

    Args:
        path: The file.
        keys: What it must hold.
        identities: Fingerprints of the configuration that it must come from: today's, and that of its run's folder.

    Raises:
        TornError: Absent, torn or foreign.
        UsageError: Of another format version or another configuration.
    """
    if not path.is_file():
        raise TornError(f"expected a checkpoint at {path}, there is none")
    try:
        # torch itself does not look at the checksums, and what is no archive it would read as plain pickle
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise ValueError(f"{bad} has another checksum than was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can make the reader raise anything
        reason = first_line(error)[:120]
        raise TornError(
            f"expected a whole checkpoint of this project at {path}, it is torn or foreign ({reason})"
        ) from None
    if not isinstance(state, dict) or "format_version" not in state:
        raise TornError(f"expected a checkpoint of this project at {path}, got one without a format version")
    version = state["format_version"]
    if version not in READ:
        raise UsageError(
            f"expected format version {FORMAT_VERSION} in {path}, got {version!r}; use the version of chela that "
            "wrote it"
        )
    if missing := [key for key in (*keys, "fingerprint") if key not in state]:
        raise TornError(f"expected a checkpoint of this project at {path}, it lacks {', '.join(missing)}")
    if state["fingerprint"] not in identities:
        raise UsageError(
            f"expected a checkpoint of this run's configuration ({' or '.join(identities)}) at {path}, got one of "
            f"another ({state['fingerprint']}); put back the run's own file, or the code it was trained with"
        )
    return state
