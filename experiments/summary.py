"""From runs to the numbers of a table: every cell is one configuration over its seeds."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.runs import TASKS, Run, labels, task_order

BASELINE = "softmax"  # speed, memory and parameters are given beside it, as papers on the Long Range Arena do
COSTS = ("parameters", "tokens_per_second", "peak_memory_bytes")


@dataclass(frozen=True)
class Cell:
    """The runs of one system on one task that differ by their seed alone."""

    runs: tuple[Run, ...]

    @cached_property
    def finished(self) -> tuple[Run, ...]:
        """Those that have a result."""
        return tuple(run for run in self.runs if run.state == "finished")

    @property
    def accuracies(self) -> list[float]:
        """Test accuracies in per cent, of every finished seed, the unlucky ones too."""
        return [100 * run.result["test_accuracy"] for run in self.finished]

    @property
    def mean(self) -> float | None:
        """Mean over the finished seeds."""
        return statistics.fmean(self.accuracies) if self.accuracies else None

    @property
    def sd(self) -> float | None:
        """Standard deviation over the seeds (n − 1); None for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def machines(self) -> set[str]:
        """What the finished runs were computed on, and by how many threads and processes."""
        return {machine(run) for run in self.finished}

    @property
    def at_chance(self) -> int:
        """Seeds that learned nothing: training never left the majority class by more than a point."""
        return sum(run.result.get("learned") is False for run in self.finished)

    def count(self, state: str) -> int:
        """Count the runs in a state."""
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
        speed = self._median_speed()
        if speed and key == "tokens_per_second":
            return speed
        if speed and key == "training_seconds":
            values = [result[key] * result["tokens_per_second"] / speed for result in results]
        return statistics.fmean(values) if values else None

    def lacking(self, key: str) -> list[Run]:
        """Return the finished runs whose ``result.json`` does not tell what a cost is made of."""
        needed = (key, "tokens_per_second") if key == "training_seconds" else (key,)
        return [run for run in self.finished if not all(run.result.get(name) for name in needed)]

    def _median_speed(self) -> float | None:
        steps = [value for run in self.finished for value in run.metrics("train").get("tokens_per_second", ())]
        return statistics.median(steps) if steps else None

    def config(self, key: str) -> Any:
        """Return an option that all seeds share."""
        return self.runs[0].config.get(key)


@dataclass(frozen=True)
class Part:
    """A table: what may stand side by side, that is one preset and one validation policy."""

    preset: str
    policy: str
    cells: dict[str, dict[str, Cell]]
    """By row, then by task."""

    @property
    def tasks(self) -> list[str]:
        """The six tasks, and others that were run."""
        run = {task for row in self.cells.values() for task in row}
        return sorted(run | set(TASKS), key=task_order)

    @property
    def runs(self) -> list[Run]:
        """All runs of the table."""
        return [run for row in self.cells.values() for cell in row.values() for run in cell.runs]

    def majority(self, task: str) -> float | None:
        """Accuracy of always naming the most frequent class of the test set, in per cent."""
        found = {
            run.result.get("majority_accuracy") for run in self.runs if run.state == "finished" and run.task == task
        } - {None}
        return 100 * found.pop() if len(found) == 1 else None

    def average(self, row: str) -> float | None:
        """Mean over the six tasks; None unless all of them have a result."""
        means = [self.cells[row][task].mean if task in self.cells[row] else None for task in TASKS]
        return statistics.fmean(mean for mean in means if mean is not None) if None not in means else None

    def relative(self, row: str, task: str, key: str) -> float | None:
        """Return a cost divided by that of softmax on the same task; None where it was another machine's.

        The number of parameters is the same everywhere.
        """
        mine, base = self.cells[row].get(task), self.cells.get(BASELINE, {}).get(task)
        if key != "parameters" and mine and base and mine.machines != base.machines:
            return None
        mine_cost, base_cost = mine and mine.cost(key), base and base.cost(key)
        return mine_cost / base_cost if mine_cost and base_cost else None

    def mean_relative(self, row: str, key: str) -> float | None:
        """Return the geometric mean of ``relative`` over the tasks where there is one."""
        ratios = [ratio for task in self.cells[row] if (ratio := self.relative(row, task, key))]
        return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None

    def notes(self) -> list[str]:
        """Say everything that a reader needs in order not to take the table for more than it is."""
        finished = [run for run in self.runs if run.state == "finished"]
        commits = sorted({_commit(run) for run in finished})
        hours = sum(run.result.get("wall_seconds", 0) for run in finished) / 3600
        notes = [
            f"preset {self.preset}" + ("" if self.preset == "full" else ": a smaller task, not an LRA number"),
            f"validation {self.policy}: "
            + ("the test set chose the checkpoint, as some papers do" if self.policy == "test" else "data kept apart")
            + "; the best checkpoint on validation is tested once",
            f"commit {', '.join(commits) or 'unknown'}",
            f"{len(finished)} finished runs, {hours:.1f} hours of them in all",
        ]
        return [*notes, *self._differences(finished)]

    def _differences(self, finished: list[Run]) -> list[str]:
        notes = []
        for task in self.tasks:
            members = [run for run in self.runs if run.task == task]
            by_steps: dict[Any, set[str]] = defaultdict(set)
            for run in members:
                by_steps[run.config.get("trainer.max_steps")].add(run.model)
            if len(by_steps) > 1:
                said = "; ".join(f"{steps}: {', '.join(sorted(names))}" for steps, names in sorted(by_steps.items()))
                notes.append(f"{task}: the steps differ ({said})")
            sources = {run.config.get("data.source", "auto") for run in members} - {"auto"}
            if sources:
                notes.append(f"{task}: data.source={', '.join(sorted(sources))}, not the task's own data")
        machines = sorted({machine(run) for run in finished})
        if len(machines) > 1:
            notes.append(f"speed and memory are compared within a machine only, of these: {'; '.join(machines)}")
        elif machines:
            notes.append(f"speed and memory on {machines[0]}" + _memory_note(finished))
        return notes


def machine(run: Run) -> str:
    """Name what a run was computed on; costs are compared only where it is the same."""
    threads, processes = run.result.get("threads"), run.result.get("processes", 1)
    return f"{run.result.get('device')} (threads: {threads}{f', processes: {processes}' if processes != 1 else ''})"


def _memory_note(finished: list[Run]) -> str:
    on_gpu = all("NVIDIA" in str(run.result.get("device")) for run in finished)
    return "" if on_gpu else "; memory is the whole process's, Python and torch included"


def _commit(run: Run) -> str:
    commit = str(run.result.get("git_commit") or "unknown")
    sha, plus, changes = commit.partition("+")
    return sha[:10] + plus + changes


def parts(runs: Sequence[Run]) -> list[Part]:
    """Sort runs into tables; presets and validation policies are never mixed in one."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.preset, run.policy].append(run)
    order = {preset: place for place, preset in enumerate(("full", "mini", "tiny"))}
    keys = sorted(groups, key=lambda key: (order.get(key[0], len(order)), key))
    return [_part(preset, policy, groups[preset, policy]) for preset, policy in keys]


def _part(preset: str, policy: str, runs: list[Run]) -> Part:
    names = labels(runs)
    cells: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        cells[names[run.path]][run.task].append(run)
    ordered = sorted(cells, key=lambda name: (not name.startswith("chela"), name))
    return Part(
        preset,
        policy,
        {name: {task: Cell(tuple(found)) for task, found in cells[name].items()} for name in ordered},
    )


@dataclass(frozen=True)
class Published:
    """A row of a paper: ``values`` by task, None where its source gives no number, "fail" where it reports failure."""

    name: str
    mark: str
    source: str
    values: dict[str, float | str | None]
    average: float | None


def published() -> list[Published]:
    """Read the rows of ``published.yaml``; CHELA's own is there to say that it was not obtained."""
    loaded: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("published.yaml")))
    return [
        Published(
            row["name"],
            row["mark"],
            row["source"],
            dict(zip(TASKS, row["values"], strict=True)),
            row["average"],
        )
        for row in loaded["rows"]
    ]
