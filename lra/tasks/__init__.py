"""Tasks by name: what there is, what each can be told, and a task made from its options.

A task is a class in one of the modules here, or one of your own, named ``module:Class``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
from typing import Any, get_type_hints

from chela.core.options import closest, option, shown
from lra.tasks.base import Task

_WHERE = {
    "corpus": "corpus:Corpus",
    "enwik8": "corpus:Enwik8",
    "image": "image:Image",
    "listops": "listops:ListOps",
    "pathfinder": "pathfinder:Pathfinder",
    "pathx": "pathfinder:PathX",
    "recall": "recall:Recall",
    "retrieval": "retrieval:Retrieval",
    "select": "select:Select",
    "shakespeare": "corpus:Shakespeare",
    "text": "text:Text",
    "text8": "corpus:Text8",
    "wikitext103": "corpus:WikiText103",
}


def names() -> list[str]:
    """List the tasks of this package."""
    return sorted(_WHERE)


def task_class(name: str) -> type[Task]:
    """Return a task's class by its name here, or by ``module:Class``; its module is imported.

    Raises:
        ValueError: There is no such task.

    >>> task_class("listops").title
    'ListOps'
    """
    if ":" not in name and name not in _WHERE:
        known = ", ".join(names())
        raise ValueError(
            f"task.name: expected one of {known}, or module:Class, got {shown(name)}{closest(name, names())}"
        )
    module, _, attribute = (f"{__name__}.{_WHERE[name]}" if name in _WHERE else name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"task.name: could not import {shown(name)} ({error}); is its folder on PYTHONPATH?") from None
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"task.name: expected a subclass of lra.tasks.base.Task, {shown(name)} is {shown(found)}")
    return found


@functools.cache
def task_options(name: str) -> type:
    """Return the dataclass of a task's options: ``name``, then the fields or keyword arguments of its class.

    Raises:
        ValueError: There is no such task, or an option has no type.

    >>> task_options("listops")(max_depth=3).max_depth
    3
    """
    made: Any = task_class(name)
    is_dataclass = dataclasses.is_dataclass(made)
    given = [field for field in dataclasses.fields(made) if field.init] if is_dataclass else _keywords(made)
    hints = get_type_hints(made if is_dataclass else made.__init__)
    fields: list[Any] = [("name", "str", option(name, "name of the task"))]
    for field in given:
        if field.name not in hints:
            raise ValueError(f"{name}: expected a type for the option {field.name!r}, as in {field.name}: int = 1")
        if field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{name}: expected a default of the option {field.name!r}, got none; every option has one")
        same = dataclasses.field(default=field.default, default_factory=field.default_factory, metadata=field.metadata)
        fields.append((field.name, inspect.formatannotation(hints[field.name]), same))
    return dataclasses.make_dataclass(f"{made.__name__}Options", fields, kw_only=True)


def get_task(options: Any) -> Task:
    """Return the task that options describe; a task is returned as it is.

    Raises:
        ValueError: An option is out of range, or there is no such task.
    """
    if isinstance(options, Task):
        return options
    _, *own = dataclasses.fields(task_options(options.name))
    task = task_class(options.name)(**{field.name: getattr(options, field.name) for field in own})
    for fact in ("l_max", "num_classes"):
        if not hasattr(task, fact):
            raise ValueError(
                f"{options.name}: expected the fact {fact}, got none; set it in the class or __post_init__"
            )
    if task.objective not in ("classification", "tokens") or task.score not in ("accuracy", "loss"):
        raise ValueError(
            f"{options.name}: expected objective classification or tokens, score accuracy or loss, got "
            f"{task.objective!r} and {task.score!r}"
        )
    if type(task).dataset is Task.dataset:
        raise ValueError(f"{options.name}: expected a method dataset(split), got none")
    return task


def _keywords(made: type) -> list[dataclasses.Field[Any]]:
    """Return the constructor's arguments as fields; the meaning of each is its line in the docstring's ``Args``."""
    text = f"{made.__doc__ or ''}\n{made.__init__.__doc__ or ''}"  # type: ignore[misc]
    found = []
    for parameter in list(inspect.signature(made.__init__).parameters.values())[1:]:  # type: ignore[misc]
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            meaning = re.search(rf"^\s*{parameter.name}(?: \(.*\))?: (.+)$", text, re.MULTILINE)
            default = dataclasses.MISSING if parameter.default is parameter.empty else parameter.default
            found.append(option(default, meaning[1] if meaning else ""))
            found[-1].name = parameter.name
    return found
