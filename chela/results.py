"""``result.json``, which tables read: its format, the order of tasks, and what may be called a result of LRA's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chela.config.compose import resolve
from chela.config.schema import Config
from chela.core.errors import UsageError

RESULT_FORMAT_VERSION = 2

TITLES = {
    "listops": "ListOps",
    "text": "Text",
    "retrieval": "Retrieval",
    "image": "Image",
    "pathfinder": "Pathfinder",
    "pathx": "Path-X",
}
"""The six tasks of the Long Range Arena in the order of its tables."""

COLUMN_GROUPS = {"LRA": tuple(TITLES), "selection": ("select", "recall"), "language": ("shakespeare",)}
"""The groups of a table's columns, in order; each has an average of its own."""

ACCURACY = {"name": "accuracy", "unit": "%", "scale": 100, "digits": 2, "best": "max"}


def read_result(path: Path) -> dict[str, Any]:
    """Read a result; UsageError where it is not there, does not parse, or is of another format version."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if result["format_version"] == RESULT_FORMAT_VERSION:
            return result
        reason = f"format version {result['format_version']!r}, not {RESULT_FORMAT_VERSION}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise UsageError(
        f"expected the result of a finished run at {path}, could not read it ({reason}); delete it and resume the run "
        "to have it written anew"
    )


def to_the_letter(config: Config) -> bool:
    """Whether a run learns one of LRA's tasks as ``preset=full`` has it, and no other data."""
    full = resolve([f"task={config.task.name}", "preset=full"])
    same = (config.task, config.data.source, config.weights) == (full.task, full.data.source, "")
    return config.task.name in TITLES and same
