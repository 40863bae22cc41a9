"""A run's fingerprint: a hash of the options that change its numbers; and how it outlives a change of the options.

Where a run lies, how it is watched and how it is cut into launches changes no number: such an option is declared with
``identity=False``. An option added later is declared with ``neutral=VALUE``, the value at which it changes nothing and
is not hashed, so that older runs keep their fingerprint. A removed option stands in ``RETIRED``, or in the attribute
``retired`` of its task.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from chela.config.schema import Config, fields, values
from chela.core.errors import OptionError, UsageError
from chela.core.files import code_of
from chela.core.options import Field, shown
from lra.tasks import task_class, task_options
from lra.tasks.base import Task

RETIRED: dict[tuple[str, str], dict[str, Any]] = {
    ("", "model.tie"): {"neutral": False},
    ("", "model.readout"): {"neutral": "mean"},
    ("", "trainer.chance_steps"): {"identity": False},
    ("", "trainer.tenth_every"): {"identity": False},
    ("chela", "model.mixer.d_pool"): {"neutral": None},
    ("chela", "model.mixer.short_kernel"): {"value": 5},
    ("chela", "model.mixer.feature_map"): {"value": "silu"},
    ("chela", "model.mixer.normalize"): {"value": False},
    ("chela", "model.mixer.decay"): {"value": "none"},
    ("hedgehog", "model.mixer.rotary"): {"value": False},
    ("lion", "model.mixer.feature_map"): {"value": "shifted_silu"},
}
"""Removed options by system (or task, or "" for any run) and key. ``value`` is the one value that can still be read; it
is hashed. ``neutral`` is such a value that is not hashed. With ``identity=False`` any value is read and none is
hashed."""


def fingerprint(config: Config) -> str:
    """Return 8 hexadecimal digits that are equal for runs that must give equal numbers."""
    identity = identity_of(values(config)) | {f"code of {name}": mark for name, mark in own_code(config).items()}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def own_code(config: Config) -> dict[str, str]:
    """Return a hash of the code of a user's own task and system: edited code makes another run."""
    return {name: code_of(name) for name in (config.task.name, config.model.mixer.name) if ":" in name}


def identity_of(options: dict[str, Any], *, neutral: bool = False) -> dict[str, Any]:
    """Return the options, by dotted key, that determine a run's numbers.

    Where the data lies does not. But released data differs from what the task would generate, and a user's text is
    known by the name of its file. A task's first version, 1.0.0, is left out. With ``neutral`` the options added later
    are there at their neutral values too: by these tables name their rows.
    """
    task, mixer = str(options.get("task.name")), str(options.get("model.mixer.name"))
    declared, rows = _declared(task, mixer), retired(task, mixer)
    kept = {key: row["value"] for key, row in rows.items() if "value" in row}
    for key, value in options.items():
        option = rows.get(key, declared.get(key, {}))
        if option.get("identity", True) and not ("neutral" in option and option["neutral"] == value):
            kept[key] = value
    facts, root = _task_class(task), options.get("data.root")
    if root is not None and facts.generated:
        kept["data.released"] = True
    if root is not None and facts.own_text:
        kept["data.text"] = Path(root).name
    if facts.version != Task.version:
        kept["task.version"] = facts.version
    newer = {key: option["neutral"] for key, option in declared.items() if "neutral" in option}
    return newer | kept if neutral else kept


@functools.cache
def _declared(task: str, mixer: str) -> dict[str, Any]:
    """Return the metadata of every option, by dotted key, but those of a user's own task or system."""
    from chela.layers.mixers import mixer_options  # loads torch

    declared: dict[str, Any] = {key: item.metadata for key, _, item in fields(Config())}
    for prefix, name, read in (("task.", task, task_options), ("model.mixer.", mixer, mixer_options)):
        with contextlib.suppress(UsageError):  # of a version that had others
            own = () if ":" in name else dataclasses.fields(read(name))
            declared |= {f"{prefix}{item.name}": item.metadata for item in own}
    return declared


def retired(task: str, mixer: str) -> dict[str, dict[str, Any]]:
    """Return the rows of ``RETIRED`` that hold for runs of a task and a system, by key."""
    rows = {key: row for (owner, key), row in RETIRED.items() if owner in (task, mixer, "")}
    return rows | {f"task.{option}": {"value": value} for option, value in _task_class(task).retired.items()}


def _task_class(task: str) -> type[Task]:
    """Return a task's class; the base class for a user's own, and for one that this version does not have."""
    with contextlib.suppress(OptionError):
        return Task if ":" in task else task_class(task)
    return Task


def of_today(saved: dict[str, Any], declared: dict[str, Field]) -> dict[str, Any]:
    """Return saved options without the removed ones, and with neutral values for those added later.

    Both are by dotted key. OptionError if a removed option has a value that can no longer be read.

    >>> of_today({"model.mixer.name": "chela", "model.mixer.d_pool": None, "model.mixer.d_value": 64}, {})
    {'model.mixer.name': 'chela', 'model.mixer.d_value': 64}
    """
    options, mixer = dict(saved), str(saved.get("model.mixer.name"))
    for key, row in retired(str(saved.get("task.name", "")), mixer).items():
        value = row.get("value", row.get("neutral"))
        if (got := options.pop(key, value)) != value and row.get("identity", True):
            raise OptionError(f"{key}: expected {shown(value)}, the one value that is still read, got {shown(got)}")
    return {key: item.metadata["neutral"] for key, item in declared.items() if "neutral" in item.metadata} | options
