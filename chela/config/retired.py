"""What a saved run may say of options that came or went since it was made.

A newer option is declared with ``neutral=VALUE``: runs of before have that value. An option that is no more stands in
``RETIRED``, or in the attribute ``retired`` of its task.
"""

from __future__ import annotations

import contextlib
from typing import Any

from chela.core.options import Field, shown

RETIRED: dict[tuple[str, str], dict[str, Any]] = {
    ("", "model.tie"): {"neutral": False},
    ("", "trainer.chance_steps"): {"identity": False},
    ("", "trainer.tenth_every"): {"identity": False},
    ("chela", "model.mixer.d_pool"): {"neutral": None},
    ("chela", "model.mixer.short_kernel"): {"value": 5},
    ("chela", "model.mixer.feature_map"): {"value": "silu"},
    ("chela", "model.mixer.normalize"): {"value": False},
    ("chela", "model.mixer.decay"): {"value": "none"},
    ("lion", "model.mixer.feature_map"): {"value": "shifted_silu"},
}
"""By system (or task, or "" for any run) and key: ``value``, the one that all runs have which can still be read, and
that their fingerprint counts; ``neutral``, one that it does not count; or ``identity=False``: none is counted."""


def retired(task: str, mixer: str) -> dict[str, dict[str, Any]]:
    """Return the rows of ``RETIRED`` that hold for runs of a task and a system, by key."""
    rows = {key: row for (owner, key), row in RETIRED.items() if owner in (task, mixer, "")}
    if task and ":" not in task:
        from lra.tasks import task_class  # which loads numpy

        with contextlib.suppress(ValueError):  # a task of another version
            rows |= {f"task.{option}": {"value": value} for option, value in task_class(task).retired.items()}
    return rows


def of_today(saved: dict[str, Any], declared: dict[str, Field]) -> dict[str, Any]:
    """Return what was saved without retired options, and with the neutral values of the newer ones that it lacks.

    Both are by dotted key. ValueError where a retired option has another value than can be read.

    >>> of_today({"model.mixer.name": "chela", "model.mixer.d_pool": 16, "model.mixer.d_value": 64}, {})
    {'model.mixer.name': 'chela', 'model.mixer.d_value': 64, 'model.mixer.pooled': 0.25}
    """
    options, mixer = dict(saved), str(saved.get("model.mixer.name"))
    if width := options.pop("model.mixer.d_pool", None):
        options["model.mixer.pooled"] = width / options["model.mixer.d_value"]
    for key, row in retired(str(saved.get("task.name", "")), mixer).items():
        value = row.get("value", row.get("neutral"))
        if (got := options.pop(key, value)) != value and row.get("identity", True):
            raise ValueError(f"{key}: expected {shown(value)}, the one value that is still read, got {shown(got)}")
    return {key: item.metadata["neutral"] for key, item in declared.items() if "neutral" in item.metadata} | options
