"""From runs to the numbers of a table: one frame, in which a line is a cell, one configuration over its seeds."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from chela.config.compose import resolve
from chela.config.schema import values
from chela.config.words import plain
from chela.core.errors import UsageError
from chela.results import ACCURACY, TITLES
from experiments.runs import RATE, Run, read_file, task_order

BASELINE = "softmax"  # speed, memory and parameters are given beside it, as papers on the Long Range Arena do
COSTS = {"parameters": "parameters", "tokens_per_second": "tokens/s", "peak_memory_bytes": "memory"}  # and their titles
STATES = ("at chance", "failed", "unfinished", "untested")  # at chance: it never left the majority class by a point
STEPS = "trainer.max_steps"
ARENA = ("full", "lite")  # presets with LRA's own tasks
_PRESETS = ("full", "lite", "mini", "tiny")  # in the order of tables, other ones follow
_SAID_LAST = (RATE, "trainer.threads", "trainer.accelerator")
_SAME_CELL = {"seed", "preset", "model.name"}


def row_order(name: str) -> tuple[bool, str]:
    """Return the sort key of a row's name: CHELA and its variants first."""
    return (not name.startswith("chela"), name)


def row_names(runs: Sequence[Run]) -> dict[Path, str]:
    """Name each run's row in a table: its model and, where that was run in several ways, what differs.

    Values of the configuration files are left out, so that in an ablation the full system has its plain name, and a
    name means the same on every task. A learning rate (unless a grid chose it) and the device are named only where
    nothing else tells two ways apart. Runs share a name only if they differ by nothing but their seed, or the task.
    """
    named = {}
    for model in {run.model for run in runs}:
        members = [run for run in runs if run.model == model]
        keys = _telling_apart(members)
        for run in members:
            usual = _usual(run.task, model, run.preset) if keys else {}
            words = [f"{key}={plain(run.config.get(key))}" for key in keys if run.config.get(key) != usual.get(key)]
            named[run.path] = f"{model} [{', '.join(words)}]" if words else model
    return named


def _telling_apart(runs: Sequence[Run]) -> list[str]:
    """Return the options that differ between runs of one system on one task."""
    options = dict.fromkeys(key for run in runs for key in run.config if key not in _SAME_CELL)
    frame = pd.DataFrame([{key: repr(run.config.get(key)) for key in options} for run in runs])
    tasks = [ways.drop_duplicates() for _, ways in frame.groupby([run.task for run in runs])]
    keys = [key for key in options if any(ways[key].nunique() > 1 for ways in tasks)]
    for last in _SAID_LAST:
        fewer = [key for key in keys if key != last]
        if all(len(set(ways[fewer].itertuples(index=False))) == len(ways) for ways in tasks):
            keys = fewer
    return keys


@cache
def _usual(task: str, model: str, preset: str) -> dict[str, Any]:
    """Return the values of the configuration files; nothing for a task or model that is not here."""
    try:
        return values(resolve([f"task={task}", f"model={model}", f"preset={preset}"]))
    except UsageError:
        return {}


def cell_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the line of runs that differ by their seed alone; NaN where nothing is known.

    Scores are over every finished seed, the unlucky ones too. Costs are means over the seeds that have them; tokens/s
    are those of the median logged step, which a pause or a busy neighbour does not change.
    """
    done = [run for run in runs if run.state == "finished"]
    values = pd.Series([run.value for run in done], dtype=float)
    results = pd.DataFrame([run.result for run in done])
    line = {"runs": list(runs), "mean": values.mean(), "sd": values.std(), "seeds": len(done)}
    line |= {state: sum(run.state == state for run in runs) for state in STATES}
    line["at chance"] = sum(run.result.get("learned") is False for run in done)
    costs = results.reindex(columns=[*COSTS, "wall_seconds", "epochs"]).astype(float)
    line |= dict(costs.where(costs > 0).mean())
    speeds = [run.metrics("train").get("tokens_per_second", pd.Series(dtype=float)) for run in done]
    if not np.isnan(median := pd.concat(speeds).median() if speeds else np.nan):
        line["tokens_per_second"] = median
    line["adds"] = pd.Series([run.record["probe"]["adds"] for run in done if "probe" in run.record], dtype=float).mean()
    number = done[0].result["test"].get("count") if done and done[0].score["name"] == "accuracy" else None
    line["test variance"] = line["mean"] * (100 - line["mean"]) / number if number else 0.0  # in %²
    line["machines"] = frozenset(map(machine, done))
    return line | {"lr": runs[0].config[RATE], "steps": runs[0].config[STEPS]}


@dataclass(frozen=True)
class ResultTable:
    """Runs that may stand side by side: of one preset, one validation policy and one edition of the mini tasks."""

    preset: str
    policy: str
    edition: int
    runs: Sequence[Run]
    cells: pd.DataFrame
    """The lines of ``cell_of`` by row and task, with each of ``COSTS`` beside softmax (``parameters ×``)."""

    @property
    def name(self) -> str:
        """Return its name among other tables: ``mini, validation holdout``."""
        edition = f", edition {self.edition}" if self.edition > 1 else ""
        return f"{self.preset}, validation {self.policy}{edition}"

    @property
    def tasks(self) -> list[str]:
        """Return the six tasks, and others that were run."""
        return sorted({run.task for run in self.runs} | set(TITLES), key=task_order)

    @property
    def rows(self) -> list[str]:
        """Return the names of the rows, in order."""
        return list(self.cells.index.unique("row"))

    def column(self, task: str) -> pd.DataFrame:
        """Return the cells of a task by row, where it was run."""
        return self.cells[self.cells.index.get_level_values("task") == task].droplevel("task")

    def runs_of(self, task: str) -> list[Run]:
        """Return the runs of a task, finished ones first: those tell its title and its score."""
        return sorted((run for run in self.runs if run.task == task), key=lambda run: not run.result)

    def score(self, task: str) -> dict[str, Any]:
        """Return how a task is scored."""
        return next((run.score for run in self.runs_of(task)), ACCURACY)

    def majority(self, task: str) -> float:
        """Return the accuracy of always naming the most frequent class of the test set, in per cent; else NaN."""
        found = {run.result.get("majority_accuracy") for run in self.runs_of(task) if run.state == "finished"} - {None}
        known = len(found) == 1 and self.score(task)["name"] == "accuracy"
        return 100 * float(found.pop() or 0) if known else np.nan

    def errors(self, task: str) -> pd.Series[float]:
        """Return the squared standard error of each row's mean.

        Two or three seeds say little of a row's own deviation, so all rows are given the column's, pooled over the rows
        with several seeds that have ``learned``; where none has, that of an accuracy on so many test records.
        """
        column, learned = self.column(task), self.learned(task)
        several = learned[learned["seeds"] > 1]
        freedom = several["seeds"] - 1
        pooled = (freedom * several["sd"] ** 2).sum() / freedom.sum() if len(several) else column["test variance"]
        return pooled / column["seeds"]

    def learned(self, task: str) -> pd.DataFrame:
        """Return the cells of a task without those that never left chance, or are below the majority class."""
        column = self.column(task)
        return column[(column["at chance"] < column["seeds"]) & ~(column["mean"] < self.majority(task))]

    def leaders(self, task: str) -> list[str]:
        """Return the rows that are first on a task: the best, and all that two standard errors do not tell from it.

        The error is that of the difference of two means, by ``errors``. Only rows that have ``learned`` are among them.
        """
        column = self.learned(task)
        if column.empty:
            return []
        errors, mean = self.errors(task)[column.index], column["mean"]
        best = mean.idxmax() if self.score(task)["best"] == "max" else mean.idxmin()
        level = (mean - mean[best]).abs() <= 2 * np.sqrt(errors + errors[best])
        return [str(row) for row in column.index[level | (column.index == best)]]

    def notes(self) -> list[str]:
        """Return what a reader must know so as not to take the table for more than it is."""
        finished = [run for run in self.runs if run.state == "finished"]
        commits = {str(run.result.get("git_commit") or "unknown") for run in finished} or {"unknown"}
        short = sorted(re.sub("^([0-9a-f]{10})[0-9a-f]*", r"\1", commit) for commit in commits)
        hours = sum(run.result.get("wall_seconds", 0) for run in finished) / 3600
        smaller = self.preset not in ARENA and any(run.task in TITLES for run in self.runs)
        tested = "the test set chose the checkpoint, as some papers do" if self.policy == "test" else "data kept apart"
        notes = [
            f"preset {self.preset}{': a smaller task, not an LRA number' if smaller else ''}",
            f"validation {self.policy}: {tested}; the best checkpoint on validation is tested once",
            f"commit {', '.join(short)}",
            f"{len(finished)} finished runs, {hours:.1f} hours of them in all",
        ]
        for task in self.tasks:
            runs = self.runs_of(task)
            if len(steps := {int(run.config[STEPS]) for run in runs}) > 1:
                notes.append(f"{task}: the steps differ ({', '.join(map(str, sorted(steps)))})")
            if self.preset in ARENA and any(run.result.get("lra") is False for run in runs):
                notes.append(f"{task}: not LRA's task to the letter in every row")
            if sources := {run.config.get("data.source", "auto") for run in runs} - {"auto"}:
                notes.append(f"{task}: data.source={', '.join(sorted(sources))}, not the task's own data")
        machines = "; ".join(sorted({machine(run) for run in finished}))
        apart = ", compared within a machine only" if ";" in machines else ""
        return [*notes, f"speed and memory on {machines}{apart}"] if finished else notes


def machine(run: Run) -> str:
    """Name what a run was computed on; costs are compared only where it is the same."""
    threads, processes = run.result.get("threads"), run.result.get("processes", 1)
    return f"{run.result.get('device')} (threads: {threads}{f', processes: {processes}' if processes != 1 else ''})"


def result_tables(runs: Sequence[Run], bench: Path | None = None) -> list[ResultTable]:
    """Sort runs into tables; presets, validation policies and editions are never mixed in one.

    ``bench`` is the JSON of ``chela bench train`` that speed and memory are taken from.
    """

    def kind(run: Run) -> tuple[Any, ...]:
        return (*_PRESETS, run.preset).index(run.preset), run.preset, run.policy, -run.edition

    session = read_file(bench).get("rows") if bench else []
    if session is None:
        raise UsageError(f"bench: expected a file that chela bench train wrote, got {bench}")
    tables = []
    for (_, preset, policy, _), members in groupby(sorted(runs, key=kind), kind):
        group = list(members)
        cells = _cells(group)
        if bench or group[0].edition > 1:  # such runs shared their machine: costs are a benchmark's, or none
            itself = dict.fromkeys((f"speed, {BASELINE} / {BASELINE}", f"memory, {BASELINE} / {BASELINE}"), 1.0)
            here = [row for row in session if row["key"]["preset"] == preset]
            speeds = {row["key"]["task"]: itself | row["values"] for row in here}
            for key, what in (("tokens_per_second", "speed"), ("peak_memory_bytes", "memory")):
                ratios = [speeds.get(task, {}).get(f"{what}, {row} / {BASELINE}", np.nan) for row, task in cells.index]
                cells[f"{key} ×"] = ratios
        tables.append(ResultTable(preset, policy, group[0].edition, group, cells))
    return tables


def _cells(runs: Sequence[Run]) -> pd.DataFrame:
    names, lines = row_names(runs), defaultdict(list)
    for run in runs:
        lines[names[run.path], run.task].append(run)
    order = sorted(lines, key=lambda place: (row_order(place[0]), task_order(place[1])))
    index = pd.MultiIndex.from_tuples(order, names=["row", "task"])
    cells = pd.DataFrame([cell_of(lines[place]) for place in order], index=index)
    softmax = cells.reindex(pd.MultiIndex.from_tuples([(BASELINE, task) for _, task in order])).set_axis(index)
    alike = cells["machines"] == softmax["machines"]
    for key in COSTS:  # beside another machine's runs only the number of parameters
        cells[f"{key} ×"] = (cells[key] / softmax[key]).where(alike | (key == "parameters"))
    return cells


def published() -> list[dict[str, Any]]:
    """Return the rows of ``published.yaml``: name, mark, source, average, and the ``values`` of the six tasks.

    A value is None where its source gives no number, "fail" where it reports failure.
    """
    return list(read_file(Path(__file__).with_name("published.yaml"))["rows"])
