"""From runs to the numbers of a table: every cell is one configuration over its seeds."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from chela.cli import plain
from chela.config import resolve
from chela.errors import UsageError
from chela.groups import flat
from chela.identity import identity_of
from chela.results import ACCURACY
from experiments.runs import RATE, TASKS, Run, task_order

BASELINE = "softmax"  # speed, memory and parameters are given beside it, as papers on the Long Range Arena do
COSTS = ("parameters", "tokens_per_second", "peak_memory_bytes")
STEPS = "trainer.max_steps"
_SAID_LAST = (RATE, "trainer.threads", "trainer.accelerator")
_PRESETS = {"full": 0, "lite": 1, "mini": 2, "tiny": 3}
ARENA = ("full", "lite")  # presets with LRA's own tasks
_SAME_CELL = {"seed", "preset", "model.name"}


@dataclass(frozen=True)
class Cell:
    """The runs of one system on one task that differ by their seed alone."""

    runs: tuple[Run, ...]

    @cached_property
    def finished(self) -> tuple[Run, ...]:
        """Return the runs that have a result."""
        return tuple(run for run in self.runs if run.state == "finished")

    @cached_property
    def mean(self) -> float | None:
        """Return the mean score of every finished seed, the unlucky ones too."""
        return statistics.fmean(run.value for run in self.finished) if self.finished else None

    @property
    def sd(self) -> float | None:
        """Return the standard deviation over the seeds (n − 1); None for a single one."""
        return statistics.stdev(run.value for run in self.finished) if len(self.finished) > 1 else None

    def count(self, state: str) -> int:
        """Count the runs in a state; "at chance": that never left the majority class by more than a point."""
        if state == "at chance":
            return sum(run.result.get("learned") is False for run in self.finished)
        return sum(run.state == state for run in self.runs)

    def cost(self, key: str) -> float | None:
        """Return the mean of a number of ``result.json`` over the seeds.

        Two are told as they were at the median logged step, which leaves out what a pause or a busy neighbour did to a
        run: tokens/s, and the seconds of training, which are all its tokens at that speed. Seeds of ``lacking`` are
        left out.
        """
        lacking = self.lacking(key)
        results = [run.result for run in self.finished if run not in lacking]
        values = [result[key] for result in results]
        if self._median_speed and key == "tokens_per_second":
            return self._median_speed
        if self._median_speed and key == "training_seconds":
            values = [result[key] * result["tokens_per_second"] / self._median_speed for result in results]
        return statistics.fmean(values) if values else None

    def lacking(self, key: str) -> list[Run]:
        """Return the finished runs whose ``result.json`` does not tell what a cost is made of."""
        needed = (key, "tokens_per_second") if key == "training_seconds" else (key,)
        return [run for run in self.finished if not all(run.result.get(name) for name in needed)]

    @cached_property
    def _median_speed(self) -> float | None:
        steps = [value for run in self.finished for value in run.metrics("train").get("tokens_per_second", ())]
        return statistics.median(steps) if steps else None

    @cached_property
    def adds(self) -> float | None:
        """Return what the attention adds to the score, the mean over the probed seeds."""
        found = [run.probe["adds"] for run in self.finished if run.probe]
        return statistics.fmean(found) if found else None

    @property
    def config(self) -> dict[str, Any]:
        """Return the options, which all seeds share but for the seed."""
        return self.runs[0].config


@dataclass(frozen=True)
class ResultTable:
    """What may stand side by side: the runs of one preset and one validation policy."""

    preset: str
    policy: str
    cells: dict[str, dict[str, Cell]]
    """By row, then by task."""

    @property
    def tasks(self) -> list[str]:
        """Return the six tasks, and others that were run."""
        run = {task for row in self.cells.values() for task in row}
        return sorted(run | set(TASKS), key=task_order)

    @property
    def runs(self) -> list[Run]:
        """Return all runs of the table."""
        return [run for row in self.cells.values() for cell in row.values() for run in cell.runs]

    def runs_of(self, task: str) -> list[Run]:
        """Return the runs of a task, finished ones first: those tell its title and its score."""
        return sorted((run for run in self.runs if run.task == task), key=lambda run: not run.result)

    def score(self, task: str) -> dict[str, Any]:
        """Return how a task is scored."""
        return next((run.score for run in self.runs_of(task)), ACCURACY)

    def majority(self, task: str) -> float | None:
        """Return the accuracy of always naming the most frequent class of the test set, in per cent."""
        found = {run.result.get("majority_accuracy") for run in self.runs_of(task) if run.state == "finished"} - {None}
        return 100 * float(found.pop() or 0) if len(found) == 1 and self.score(task)["name"] == "accuracy" else None

    def average(self, row: str) -> float | None:
        """Return the mean accuracy over the six tasks; None unless all of them have a result."""
        means = [self.cells[row][task].mean if task in self.cells[row] else None for task in TASKS]
        return statistics.fmean(mean for mean in means if mean is not None) if None not in means else None

    def relative(self, row: str, task: str, key: str) -> float | None:
        """Return a cost divided by that of softmax on the same task; None where it was another machine's.

        The number of parameters is the same everywhere.
        """
        mine, base = self.cells[row].get(task), self.cells.get(BASELINE, {}).get(task)
        if mine is None or base is None:
            return None
        machines = [{machine(run) for run in cell.finished} for cell in (mine, base)]
        if key != "parameters" and machines[0] != machines[1]:
            return None
        mine_cost, base_cost = mine.cost(key), base.cost(key)
        return mine_cost / base_cost if mine_cost and base_cost else None

    def mean_relative(self, row: str, key: str) -> float | None:
        """Return the geometric mean of ``relative`` over the tasks where there is one."""
        ratios = [ratio for task in self.cells[row] if (ratio := self.relative(row, task, key))]
        return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None

    def notes(self) -> list[str]:
        """Say everything that a reader needs in order not to take the table for more than it is."""
        finished = [run for run in self.runs if run.state == "finished"]
        commits = {str(run.result.get("git_commit") or "unknown") for run in finished}
        short = sorted(re.sub("^([0-9a-f]{10})[0-9a-f]*", r"\1", commit) for commit in commits)
        hours = sum(run.result.get("wall_seconds", 0) for run in finished) / 3600
        smaller = self.preset not in ARENA and any(run.task in TASKS for run in self.runs)
        lite = ": LRA's tasks, a smaller network and fewer epochs than its rows; read it with both"
        notes = [
            f"preset {self.preset}"
            + (": a smaller task, not an LRA number" if smaller else lite if self.preset == "lite" else ""),
            f"validation {self.policy}: "
            + ("the test set chose the checkpoint, as some papers do" if self.policy == "test" else "data kept apart")
            + "; the best checkpoint on validation is tested once",
            f"commit {', '.join(short) or 'unknown'}",
            f"{len(finished)} finished runs, {hours:.1f} hours of them in all",
        ]
        for task in self.tasks:
            by_steps: dict[Any, set[str]] = defaultdict(set)
            for run in self.runs_of(task):
                by_steps[run.config.get(STEPS)].add(run.model)
            if len(by_steps) > 1:
                said = "; ".join(f"{steps}: {', '.join(sorted(names))}" for steps, names in sorted(by_steps.items()))
                notes.append(f"{task}: the steps differ ({said})")
            if self.preset in ARENA and any(run.result.get("lra") is False for run in self.runs_of(task)):
                notes.append(f"{task}: not LRA's task to the letter in every row")
            if sources := {run.config.get("data.source", "auto") for run in self.runs_of(task)} - {"auto"}:
                notes.append(f"{task}: data.source={', '.join(sorted(sources))}, not the task's own data")
        machines = sorted({machine(run) for run in finished})
        if len(machines) > 1:
            notes.append(f"speed and memory are compared within a machine only, of these: {'; '.join(machines)}")
        elif machines:
            on_gpu = all("NVIDIA" in str(run.result.get("device")) for run in finished)
            whole = "" if on_gpu else "; memory is the whole process's, Python and torch included"
            notes.append(f"speed and memory on {machines[0]}{whole}")
        return notes


def machine(run: Run) -> str:
    """Name what a run was computed on; costs are compared only where it is the same."""
    threads, processes = run.result.get("threads"), run.result.get("processes", 1)
    return f"{run.result.get('device')} (threads: {threads}{f', processes: {processes}' if processes != 1 else ''})"


def result_tables(runs: Sequence[Run]) -> list[ResultTable]:
    """Sort runs into tables; presets and validation policies are never mixed in one."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (_PRESETS.get(run.preset, len(_PRESETS)), run.preset, run.policy)):
        groups[run.preset, run.policy].append(run)
    tables = []
    for key, members in groups.items():
        named = row_names(members)
        rows: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
        for run in members:
            rows[named[run.path]][run.task].append(run)
        ordered = sorted(rows.items(), key=lambda item: row_order(item[0]))
        cells = {name: {task: Cell(tuple(runs)) for task, runs in row.items()} for name, row in ordered}
        tables.append(ResultTable(*key, cells))
    return tables


def published() -> list[dict[str, Any]]:
    """Return the rows of ``published.yaml``: name, mark, source, average, and ``values`` by task.

    A value is None where its source gives no number, "fail" where it reports failure.
    """
    loaded: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("published.yaml")))
    return [{**row, "values": dict(zip(TASKS, row["values"], strict=True))} for row in loaded["rows"]]


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
        tasks = {run.task: [other for other in members if other.task == run.task] for run in members} if keys else {}
        usual = {task: _usual(runs) for task, runs in tasks.items()}
        for run in members:
            words = [
                f"{key}={plain(run.config.get(key))}" for key in keys if run.config.get(key) != usual[run.task].get(key)
            ]
            named[run.path] = f"{run.model} [{', '.join(words)}]" if words else run.model
    return named


def _telling_apart(runs: Sequence[Run]) -> list[str]:
    """Return the options that differ between runs of one system on one task."""
    tasks: dict[str, dict[Any, dict[str, Any]]] = defaultdict(dict)
    for run in runs:
        tasks[run.task][run.cell] = run.config

    def told(ways: dict[Any, dict[str, Any]], keys: Sequence[str]) -> int:
        return len({tuple(repr(way.get(key)) for key in keys) for way in ways.values()})

    options = dict.fromkeys(key for run in runs for key in run.config if key not in _SAME_CELL)
    keys = [key for key in options if any(told(ways, [key]) > 1 for ways in tasks.values())]
    for last in _SAID_LAST:
        fewer = [key for key in keys if key != last]
        if all(told(ways, fewer) == len(ways) for ways in tasks.values()):
            keys = fewer
    return keys


def _usual(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the configuration files say for the runs' task, model and preset; nothing for what is not here.

    Of a version whose system lacked some of today's options, it is what most of the runs have.
    """
    run = runs[0]
    try:
        usual = flat(asdict(resolve([f"task={run.task}", f"model={run.model}", f"preset={run.preset}"])))
    except UsageError:
        return {}
    if {key for key in identity_of(usual) if key.startswith("model.mixer.")} <= run.config.keys():
        return usual
    values = {key: [run.config.get(key) for run in runs] for key in run.config}
    return {key: max(found, key=found.count) for key, found in values.items()}
