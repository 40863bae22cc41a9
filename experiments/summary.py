"""From runs to the numbers of a table: every cell is one configuration over its seeds."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from chela.results import ACCURACY, GROUPS
from experiments.rows import row_names, row_order
from experiments.runs import TASKS, Run, read_json, task_order

BASELINE = "softmax"  # speed, memory and parameters are given beside it, as papers on the Long Range Arena do
COSTS = ("parameters", "tokens_per_second", "peak_memory_bytes")
STEPS = "trainer.max_steps"
_PRESETS = {"full": 0, "lite": 1, "mini": 2, "tiny": 3}
ARENA = ("full", "lite")  # presets with LRA's own tasks


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

    @property
    def test_variance(self) -> float:
        """Return the variance, in %², of an accuracy measured on so many test records; 0 where that is not known."""
        number = self.finished[0].result["test"].get("count") if self.finished else None
        known = number and self.mean is not None and self.finished[0].score["name"] == "accuracy"
        return self.mean * (100 - self.mean) / number if known else 0.0

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

    @cached_property
    def by_group(self) -> dict[str, float]:
        """Return the score of each group of test records and of each further test set, by its heading.

        Means over the seeds: ``{"dashes 2": 91.2, …}``; empty where results tell of none.
        """
        found: dict[str, list[float]] = defaultdict(list)
        for run in self.finished:
            name, scale = run.score["name"], run.score["scale"]
            for key, value in run.result.items():
                if key.startswith("test_by_"):
                    for group, part in value.items():
                        found[f"{key.removeprefix('test_by_')} {group}"].append(scale * part[name])
                elif key.startswith("test_") and isinstance(value, dict):
                    found[key.removeprefix("test_")].append(scale * value[name])
        return {heading: statistics.fmean(values) for heading, values in found.items()}

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
    edition: int = 1
    """Of the mini tasks."""
    bench: Mapping[str, Mapping[str, float]] | None = None
    """What ``chela bench train`` measured in one session, by task."""

    @property
    def name(self) -> str:
        """Return what tells it from other tables: ``mini, validation holdout``."""
        edition = f", edition {self.edition}" if self.edition > 1 else ""
        return f"{self.preset}, validation {self.policy}{edition}"

    @property
    def tasks(self) -> list[str]:
        """Return the six tasks, and others that were run."""
        run = {task for row in self.cells.values() for task in row}
        return sorted(run | set(TASKS), key=task_order)

    @property
    def runs(self) -> list[Run]:
        """Return all runs of the table."""
        return [run for row in self.cells.values() for cell in row.values() for run in cell.runs]

    def column(self, task: str) -> dict[str, Cell]:
        """Return the cells of a task by row, where it was run."""
        return {row: cells[task] for row, cells in self.cells.items() if task in cells}

    def probed(self) -> list[tuple[str, str, Cell]]:
        """Return task, row and cell of what has a probe's result, in the order of the columns."""
        cells = [(task, row, cell) for task in self.tasks for row, cell in self.column(task).items()]
        return [found for found in cells if found[-1].adds is not None]

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

    def groups(self) -> dict[str, list[str]]:
        """Return the tasks of each group of columns, in order; those of nobody's group come last, under no name."""
        grouped = {name: [task for task in self.tasks if task in tasks] for name, tasks in GROUPS.items()}
        rest = [task for task in self.tasks if not any(task in tasks for tasks in GROUPS.values())]
        return {name: tasks for name, tasks in {**grouped, "": rest}.items() if tasks}

    def average(self, row: str, tasks: Sequence[str]) -> float | None:
        """Return the mean score of a row over the tasks of a group; None unless all of them have a result."""
        means = [self.cells[row][task].mean if task in self.cells[row] else None for task in tasks]
        return statistics.fmean(mean for mean in means if mean is not None) if None not in means else None

    def leaders(self, task: str) -> list[str]:
        """Return the rows that are first on a task: the best, and all that two standard errors do not tell from it.

        The error is that of the difference of two means. Two or three seeds say little of a row's own deviation, so all
        rows are given the column's, pooled over the rows with several seeds; where none has, that of an accuracy on so
        many test records. What never left chance is nowhere first, and says nothing of how far apart trained seeds lie.
        """
        column = self.column(task)
        learned = {row: cell for row, cell in column.items() if cell.count("at chance") < len(cell.finished)}
        means = {row: cell.mean for row, cell in learned.items() if cell.mean is not None}
        if not means:
            return []
        known = [(len(cell.finished) - 1, cell.sd) for cell in learned.values() if cell.sd is not None]
        pooled = sum(n * sd**2 for n, sd in known) / sum(n for n, _ in known) if known else None
        errors = {
            row: (column[row].test_variance if pooled is None else pooled) / len(column[row].finished) for row in means
        }
        best = (max if self.score(task)["best"] == "max" else min)(means, key=means.__getitem__)
        return [
            row
            for row, mean in means.items()
            if row == best or abs(mean - means[best]) <= 2 * math.sqrt(errors[row] + errors[best])
        ]

    def firsts(self) -> str:
        """Say in one sentence who is first where."""
        by_rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for task in self.tasks:
            if any(run.state == "finished" for run in self.runs_of(task)):
                by_rows[tuple(self.leaders(task))].append(self.runs_of(task)[0].title)
        told = [f"{_listed(rows or ['nobody'])} on {_listed(tasks)}" for rows, tasks in by_rows.items()]
        return f"First, with all that two standard errors do not tell from the best: {'; '.join(told)}." if told else ""

    def relative(self, row: str, task: str, key: str) -> float | None:
        """Return a cost divided by that of softmax on the same task; None where it was another machine's.

        The number of parameters is the same everywhere. Since edition 2 speed and memory come from one session of the
        benchmark alone: runs share their machine with whatever else goes on.
        """
        if key != "parameters" and (self.bench is not None or self.edition > 1):
            measured = (self.bench or {}).get(task, {})
            what = "speed" if key == "tokens_per_second" else "memory"
            return 1.0 if row == BASELINE and measured else measured.get(f"{what}, {row} / {BASELINE}")
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


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def machine(run: Run) -> str:
    """Name what a run was computed on; costs are compared only where it is the same."""
    threads, processes = run.result.get("threads"), run.result.get("processes", 1)
    return f"{run.result.get('device')} (threads: {threads}{f', processes: {processes}' if processes != 1 else ''})"


def result_tables(runs: Sequence[Run], bench: Path | None = None) -> list[ResultTable]:
    """Sort runs into tables; presets, validation policies and editions are never mixed in one.

    ``bench`` is the JSON of ``chela bench train`` that speed and memory are taken from.
    """
    session = read_json(bench)["rows"] if bench else []
    groups: dict[tuple[str, str, int], list[Run]] = defaultdict(list)
    place = _PRESETS.get
    for run in sorted(runs, key=lambda run: (place(run.preset, len(_PRESETS)), run.preset, run.policy, -run.edition)):
        groups[run.preset, run.policy, run.edition].append(run)
    tables = []
    for (preset, policy, edition), members in groups.items():
        named = row_names(members)
        rows: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
        for run in members:
            rows[named[run.path]][run.task].append(run)
        ordered = sorted(rows.items(), key=lambda item: row_order(item[0]))
        cells = {name: {task: Cell(tuple(runs)) for task, runs in row.items()} for name, row in ordered}
        speeds = {row["key"]["task"]: row["values"] for row in session if row["key"]["preset"] == preset}
        tables.append(ResultTable(preset, policy, cells, edition, speeds if bench else None))
    return tables


def published() -> list[dict[str, Any]]:
    """Return the rows of ``published.yaml``: name, mark, source, average, and ``values`` by task.

    A value is None where its source gives no number, "fail" where it reports failure.
    """
    loaded: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("published.yaml")))
    return [{**row, "values": dict(zip(TASKS, row["values"], strict=True))} for row in loaded["rows"]]
