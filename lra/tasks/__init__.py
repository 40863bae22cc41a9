"""Tasks by name: `get_task(config)` gives the task that a configuration of `lra.schema` describes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lra.schema import TASKS

if TYPE_CHECKING:
    from lra.tasks.base import Task

_MODULES = {"pathx": "pathfinder"}  # tasks that live in another's file


def get_task(config: Any) -> Task:
    """The task of a configuration, checked. Raises `ValueError` for an unknown name or an option out of range."""
    name = config.name
    if name not in TASKS:
        raise ValueError(f"task.name is {name!r}: expected one of {', '.join(TASKS)}")
    config.check()
    module = importlib.import_module(f"lra.tasks.{_MODULES.get(name, name)}")
    task: Task = module.make(config)
    return task
