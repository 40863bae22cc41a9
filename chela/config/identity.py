"""Which options make a run's numbers, and the fingerprint of those; and options that came or went since it was made.

Where a run lies, how it is watched and how it is cut into launches changes no number: such an option is declared with
``identity=False``. A newer option is declared with ``neutral=VALUE``, the value at which it changes nothing: there it
is left out, and runs of before keep their fingerprint. An option that is no more stands in ``RETIRED``, or in the
attribute ``retired`` of its task.
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
"""By system (or task, or "" for any run) and key: ``value``, the one that all runs have which can still be read, and
that their fingerprint counts; ``neutral``, one that it does not count; or ``identity=False``: none is counted."""


def fingerprint(config: Config) -> str:
    """Return 8 hexadecimal digits that are equal for runs that must give equal numbers."""
    identity = identity_of(values(config)) | {f"code of {name}": mark for name, mark in own_code(config).items()}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def own_code(config: Config) -> dict[str, str]:
    """Return a hash of the code of a task and a system of somebody's own: edited, it makes another run."""
    return {name: code_of(name) for name in (config.task.name, config.model.mixer.name) if ":" in name}


def identity_of(options: dict[str, Any], *, neutral: bool = False) -> dict[str, Any]:
    """Return, of a configuration by dotted key, what makes a run's numbers.

    Where data lies does not; but data that can be generated or released is other data with a folder of its own, and
    a text of one's own is told by its file's name. A task's first version, 1.0.0, is left out. With ``neutral`` the
    newer options are in it, where they change nothing: what a row of a table is named by.
    """
    task, mixer = str(options.get("task.name")), str(options.get("model.mixer.name"))
    declared, rows = _declared(task, mixer), retired(task, mixer)
    kept = {key: row["value"] for key, row in rows.items() if "value" in row}
    for key, value in options.items():
        said = rows.get(key, declared.get(key, {}))
        if said.get("identity", True) and not ("neutral" in said and said["neutral"] == value):
            kept[key] = value
    facts, root = _facts(task), options.get("data.root")
    if root is not None and facts.generated:
        kept["data.released"] = True
    if root is not None and facts.own_text:
        kept["data.text"] = Path(root).name
    if facts.version != Task.version:
        kept["task.version"] = facts.version
    newer = {key: said["neutral"] for key, said in declared.items() if "neutral" in said}
    return newer | kept if neutral else kept


@functools.cache
def _declared(task: str, mixer: str) -> dict[str, Any]:
    """Return what is declared of every option, by dotted key; nothing for a task or system of somebody's own."""
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
    return rows | {f"task.{option}": {"value": value} for option, value in _facts(task).retired.items()}


def _facts(task: str) -> type[Task]:
    """Return the class of a task; that of all where it is somebody's own, or one of another version."""
    with contextlib.suppress(OptionError):
        return Task if ":" in task else task_class(task)
    return Task


def of_today(saved: dict[str, Any], declared: dict[str, Field]) -> dict[str, Any]:
    """Return what was saved without retired options, and with the neutral values of the newer ones that it lacks.

    Both are by dotted key. OptionError where a retired option has another value than can be read.

    >>> of_today({"model.mixer.name": "chela", "model.mixer.d_pool": 16, "model.mixer.d_value": 64}, {})
    {'model.mixer.name': 'chela', 'model.mixer.d_value': 64, 'model.mixer.pooled': 0.25}
    """
    options, mixer = dict(saved), str(saved.get("model.mixer.name"))
    if width := options.pop("model.mixer.d_pool", None):
        options["model.mixer.pooled"] = width / options["model.mixer.d_value"]
    for key, row in retired(str(saved.get("task.name", "")), mixer).items():
        value = row.get("value", row.get("neutral"))
        if (got := options.pop(key, value)) != value and row.get("identity", True):
            raise OptionError(f"{key}: expected {shown(value)}, the one value that is still read, got {shown(got)}")
    return {key: item.metadata["neutral"] for key, item in declared.items() if "neutral" in item.metadata} | options
