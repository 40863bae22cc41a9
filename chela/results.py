"""The format of ``result.json``, which tables read: version 2, and version 1 brought to it."""

from __future__ import annotations

from typing import Any

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

ACCURACY = {"name": "accuracy", "unit": "%", "scale": 100, "digits": 2, "best": "max"}


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
