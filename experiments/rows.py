"""The name of each run's row in a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from chela.config.compose import resolve
from chela.config.groups import flat
from chela.config.words import plain
from chela.core.errors import UsageError
from experiments.runs import RATE, Run

_SAID_LAST = (RATE, "trainer.threads", "trainer.accelerator")
_SAME_CELL = {"seed", "preset", "model.name"}


def row_order(name: str) -> tuple[bool, str]:
    """Return the sort key of a row's name: CHELA and its variants first."""
    return (not name.startswith("chela"), name)


def row_names(runs: Sequence[Run]) -> dict[Path, str]:
    """Name each run's row: its model, and where one was run in several ways on a task, what sets this way apart.

    What the configuration files say for the task and the model goes without saying, so that in an ablation the full
    system is called by its name alone, and a name means the same on every task. The learning rate (the one that was
    chosen for a way is a part of it) and where it ran are named only where nothing else tells two ways apart. Runs are
    never joined under one name unless they differ by their seed alone (or by the task).
    """
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.preset, run.model].append(run)
    named = {}
    for members in groups.values():
        keys = _telling_apart(members)
        of_task = {run.task: run for run in members if keys}
        usual = {task: _usual(run) for task, run in of_task.items()}
        for run in members:
            words = [
                f"{key}={plain(run.config.get(key))}" for key in keys if run.config.get(key) != usual[run.task].get(key)
            ]
            named[run.path] = f"{run.model} [{', '.join(words)}]" if words else run.model
    return named


def _telling_apart(runs: Sequence[Run]) -> list[str]:
    """Return the options that differ between runs of one system on one task."""
    options = dict.fromkeys(key for run in runs for key in run.config if key not in _SAME_CELL)
    told = pd.DataFrame([{key: repr(run.config.get(key)) for key in options} for run in runs])
    tasks = [ways.drop_duplicates() for _, ways in told.groupby([run.task for run in runs])]
    keys = [key for key in options if any(ways[key].nunique() > 1 for ways in tasks)]
    for last in _SAID_LAST:
        fewer = [key for key in keys if key != last]
        if all(len(set(ways[fewer].itertuples(index=False))) == len(ways) for ways in tasks):
            keys = fewer
    return keys


def _usual(run: Run) -> dict[str, Any]:
    """Return what the configuration files say for a run's task, model and preset; nothing for what is not here."""
    try:
        return flat(asdict(resolve([f"task={run.task}", f"model={run.model}", f"preset={run.preset}"])))
    except UsageError:
        return {}
