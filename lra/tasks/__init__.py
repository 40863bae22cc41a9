"""Tasks by name: which there are, their options, and a task made from options.

A task is a class in one of the modules here, or one of your own, named ``module:Class``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from chela.core.files import class_named
from chela.core.options import options_of
from lra.tasks.base import Task

TASKS = {
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


def task_class(name: str) -> type[Task]:
    """Return a task's class by its name here, or by ``module:Class``; its module is imported.

    Raises:
        OptionError: There is no such task.
    """
    return class_named("task.name", name, {known: f"{__name__}.{place}" for known, place in TASKS.items()}, Task)


@functools.cache
def task_options(name: str) -> Any:
    """Return the dataclass of a task's options: ``name``, then the fields or keyword arguments of its class.

    Raises ``OptionError`` where there is no such task, or an argument that cannot be an option.
    """
    return options_of(name, task_class(name))


def get_task(options: Any) -> Task:
    """Return the task that options describe, or a task as it is. Raises ``ValueError`` for what cannot be."""
    if isinstance(options, Task):
        return options
    _, *own = dataclasses.fields(options)
    task = task_class(options.name)(**{field.name: getattr(options, field.name) for field in own})
    task.encoding = dataclasses.asdict(options)
    for fact in ("l_max", "num_classes"):
        if not hasattr(task, fact):
            raise ValueError(f"{options.name}: expected the fact {fact}; set it in the class or __post_init__")
    if task.objective not in ("classification", "tokens") or task.score not in ("accuracy", "loss"):
        raise ValueError(
            f"{options.name}: expected objective classification or tokens, score accuracy or loss, got "
            f"{task.objective!r} and {task.score!r}"
        )
    if type(task).dataset is Task.dataset:
        raise ValueError(f"{options.name}: expected a method dataset(split), got none")
    return task
