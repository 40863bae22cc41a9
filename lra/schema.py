"""Every option of every task and of the data pipeline, typed and explained. Standard library only.

`TASKS` maps a task's name to its configuration class; `DataConfig` holds what all tasks share. Each class has
`check()`, which raises `ValueError` with one line.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field with its meaning beside it."""
    return field(default=default, metadata={"help": help})


def _at_least(owner: str, low: int, **values: int) -> None:
    for key, value in values.items():
        if value < low:
            raise ValueError(f"{owner}.{key} is {value}: expected {low} or more")


def _one_of(owner: str, key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}.{key} is {value!r}: expected one of {', '.join(allowed)}")


@dataclass
class ListOpsConfig:
    """Generated nested list operations. The defaults are the Long Range Arena's task."""

    name: str = option("listops", "name of the task")
    train: int = option(96_000, "trees to train on")
    validation: int = option(2_000, "trees to validate on")
    test: int = option(2_000, "trees to test on")
    min_length: int = option(501, "shortest tree kept, in tokens (brackets closed, parentheses not counted)")
    max_length: int = option(1_999, "longest tree kept, in tokens")
    max_depth: int = option(10, "deepest level of a tree; at this depth every node is a digit")
    max_args: int = option(10, "most arguments of an operator (the least is 2)")
    seed: int = option(0, "seed of the trees; the run's own seed does not change the data")

    def check(self) -> None:
        """Raise `ValueError` where an option is out of range."""
        _at_least("task", 1, train=self.train, validation=self.validation, test=self.test)
        _at_least("task", 1, min_length=self.min_length, max_depth=self.max_depth)
        _at_least("task", 2, max_args=self.max_args)
        _at_least("task", 0, seed=self.seed)
        if self.max_length < self.min_length:
            raise ValueError(f"task.max_length is {self.max_length}: expected min_length ({self.min_length}) or more")
        if max(self.train, self.validation, self.test) > 1_000_000_000 or self.seed >= 2**63:
            raise ValueError("task: expected up to 1,000,000,000 trees a split and a seed below 2**63")
        if self.max_args > 64 or self.max_depth > 64 or self.max_length > 1_000_000:
            raise ValueError("task: expected max_args and max_depth up to 64 and max_length up to 1,000,000")


@dataclass
class DataConfig:
    """What all tasks share: where data lies, where it comes from, how batches are made."""

    dir: str = option("", "folder for prepared records; empty: $CHELA_DATA, else ~/.cache/chela")
    root: str | None = option(None, "folder or archive of your own to take the data from")
    validation: str = option(
        "holdout", "'holdout': validate on data kept apart; 'test': on the test set, as some papers do"
    )
    processes: int = option(0, "parallel workers that build records; 0: one per core")
    workers: int = option(0, "loader workers; 0: load in the training process")
    pool: int = option(8, "batches per bucketing pool: larger pools pad less and shuffle less")

    def check(self) -> None:
        """Raise `ValueError` where an option is out of range."""
        _one_of("data", "validation", self.validation, ("holdout", "test"))
        _at_least("data", 0, processes=self.processes, workers=self.workers)
        _at_least("data", 1, pool=self.pool)
        if self.workers > 256 or self.processes > 1024 or self.pool > 100_000:
            raise ValueError("data: expected up to 256 workers, 1,024 processes and pools of 100,000 batches")

    def folder(self) -> Path:
        """The folder for prepared records, with the environment and `~` resolved."""
        folder = self.dir or os.environ.get("CHELA_DATA") or "~/.cache/chela"
        return Path(os.path.expanduser(folder))  # leaves an unknown ~user alone, where Path.expanduser raises


TASKS: dict[str, type] = {"listops": ListOpsConfig}
