"""Which options make a run's numbers, and the fingerprint of those.

Where a run lies, how it is watched and how it is cut into launches changes no number: such an option is declared with
``identity=False``. A newer option is declared with ``neutral=VALUE``, the value at which it changes nothing: there it
is left out, and older runs keep their fingerprint.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chela.core.errors import UsageError
from chela.options import code_of, mixer_options
from chela.schema import Config
from lra.tasks import task_class, task_options
from lra.tasks.base import Task

UNCOUNTED = ("task.version", "2.0.0")
"""Select's, of which there are runs from before a task's version counted; any later version is told apart."""


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Walk over ``(dotted key, value, field)`` of a configuration's leaves."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item


def fingerprint(config: Config) -> str:
    """Return 8 hexadecimal digits that are equal for runs that must give equal numbers."""
    return _mark(identity_of({key: value for key, value, _ in fields(config)}), own_code(config))


def _mark(identity: dict[str, Any], own_code: dict[str, str]) -> str:
    identity = identity | {f"code of {name}": mark for name, mark in own_code.items()}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def own_code(config: Config) -> dict[str, str]:
    """Return a hash of the code of a task and a system of somebody's own: edited, it makes another run."""
    names = (config.task.name, config.model.mixer.name)
    return {name: code_of(name) for name in names if ":" in name}


def identities(config: Config, saved: dict[str, Any] | None = None) -> tuple[str, ...]:
    """Return the fingerprints that a run of this configuration may have: today's, and those of older versions.

    Version 0.1 counted two options more, and a task's version did not count at first.

    Args:
        config: The run's configuration.
        saved: The same by dotted key, as the run wrote it down, where options may have had other names.
    """
    ways = [{key: value for key, value, _ in fields(config)}, *([] if saved is None else [saved])]
    more = ("trainer.log_every", "trainer.chance_steps")
    marks = []
    for options in ways:
        today = identity_of(options)
        unversioned = {key: value for key, value in today.items() if (key, value) != UNCOUNTED}
        first = today | {key: options[key] for key in more if key in options}
        marks += [_mark(identity, own_code(config)) for identity in (today, unversioned, first)]
    return tuple(marks)


def identity_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return, of a configuration by dotted key, what makes a run's numbers.

    Where data lies does not; but data that can be generated or released is other data with a folder of its own, and
    a text of one's own is told by its file's name. A task's first version, 1.0.0, is left out.
    """
    task, mixer = str(options.get("task.name")), str(options.get("model.mixer.name"))
    kinds = _kinds(task, mixer)
    kept = {
        key: value
        for key, value in options.items()
        if kinds.get(key, {}).get("identity", True)
        and not ("neutral" in kinds.get(key, {}) and kinds[key]["neutral"] == value)
    }
    root = options.get("data.root")
    released = _fact(task, "generated") and root is not None
    text = {"data.text": Path(root).name} if root is not None and _fact(task, "own_text") else {}
    version = _fact(task, "version")
    later = {"task.version": version} if version not in (None, Task.version) else {}
    retired = {f"task.{name}": value for name, value in (_fact(task, "retired") or {}).items()}
    return retired | kept | ({"data.released": True} if released else {}) | text | later


@functools.cache
def _kinds(task: str, mixer: str) -> dict[str, Any]:
    """Return what is declared of every option; nothing for a task or system of somebody's own."""
    declared = {key: item.metadata for key, _, item in fields(Config())}
    for prefix, name, read in (("task.", task, task_options), ("model.mixer.", mixer, mixer_options)):
        if ":" not in name:
            try:
                declared |= {f"{prefix}{item.name}": item.metadata for item in dataclasses.fields(read(name))}
            except (UsageError, ValueError):  # of a version that had others
                continue
    return declared


@functools.cache
def _fact(task: str, fact: str) -> Any:
    """Return what a task of this package says of itself; None where it is not one, or says nothing."""
    try:
        return None if ":" in task else getattr(task_class(task), fact, None)
    except ValueError:
        return None
