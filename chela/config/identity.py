"""Which options make a run's numbers, and the fingerprint of those.

Where a run lies, how it is watched and how it is cut into launches changes no number: such an option is declared with
``identity=False``. A newer option is declared with ``neutral=VALUE``, the value at which it changes nothing: there it
is left out, and older runs keep their fingerprint. So they do when an option goes: ``chela.config.retired``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from chela.config.retired import retired
from chela.config.schema import Config, fields, values
from chela.core.errors import UsageError
from chela.core.files import code_of
from lra.tasks import task_class, task_options
from lra.tasks.base import Task


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
    facts: Any = Task
    if ":" not in task:
        with contextlib.suppress(ValueError):  # a task of another version
            facts = task_class(task)
    root = options.get("data.root")
    if root is not None and getattr(facts, "generated", False):
        kept["data.released"] = True
    if root is not None and getattr(facts, "own_text", False):
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
        with contextlib.suppress(UsageError, ValueError):  # of a version that had others
            own = () if ":" in name else dataclasses.fields(read(name))
            declared |= {f"{prefix}{item.name}": item.metadata for item in own}
    return declared
