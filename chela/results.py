"""The format of ``result.json``, which tables read: version 2, and version 1 brought to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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

GROUPS = {"LRA": tuple(TITLES), "selection": ("select", "recall"), "language": ("shakespeare",)}
"""The groups of a table's columns, in order; each has an average of its own."""

ACCURACY = {"name": "accuracy", "unit": "%", "scale": 100, "digits": 2, "best": "max"}


def of_arena(result: dict[str, Any]) -> str:
    """Say what an accuracy on a task of LRA's, to the letter, was had with; empty for any other result.

    >>> of_arena({"lra": True, "parameters": 208906, "epochs": 10.0})
    "LRA's task; 208,906 parameters; 10 epochs"
    """
    if not result.get("lra"):
        return ""
    return f"LRA's task; {result['parameters']:,} parameters; {result['epochs']:.3g} epochs"


def read_result(path: Path) -> dict[str, Any]:
    """Read a result in the form of version 2, whichever version wrote it.

    Raises:
        UsageError: It is not there, does not parse, or is of another format version.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if result["format_version"] in (1, RESULT_FORMAT_VERSION):
            return upgraded(result)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"expected the result of a finished run at {path}, could not read it ({type(error).__name__}: {error}); "
            "delete it and resume the run to have it written anew"
        ) from None
    raise UsageError(
        f"expected format version {RESULT_FORMAT_VERSION} in {path}, got {result['format_version']!r}; "
        "use the version of chela that wrote it"
    )


def upgraded(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result in the form of version 2; one of version 1 is of a classification, scored by accuracy."""
    if result["format_version"] != 1:
        return result
    flat = dict(result)
    test = {name: flat.pop(f"test_{name}", None) for name in ("loss", "accuracy", "count")}
    return {
        **flat,
        "format_version": RESULT_FORMAT_VERSION,
        "task_title": TITLES.get(flat["task"], flat["task"]),
        "objective": "classification",
        "score": ACCURACY,
        "best_validation": {"accuracy": flat.pop("best_validation_accuracy")},
        "last_validation": {"accuracy": flat.pop("validation_accuracy", None)},
        "test": None if test["accuracy"] is None else test,
    }
