"""From a sweep file (docs/sweeps.md says what may stand in one) to runs: task × model × variant × seed.

A user's own model file is called by its stem everywhere else, a task's by its class.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from chela.config.compose import is_file, label, names, resolve, to_yaml
from chela.config.identity import fingerprint
from chela.config.schema import Config
from chela.config.words import plain
from chela.core.errors import UsageError, first_line
from experiments.runs import FILES, RATE, TUNE, UNREADABLE, result_in, write

OWN = {"task", "model", "preset", "seed", "runs", "resume", "trainer.threads"}  # keys that no override may set


@dataclass
class Tune:
    """The same grid of learning rates for every system; the best mean on validation is taken, the first of equals."""

    rates: list[float] = MISSING
    seeds: list[int] = field(default_factory=lambda: [0])  # each rate is run with all of them
    steps: float = 1.0  # share of the run's steps that each takes, warm-up and schedule included
    per_task: dict[str, dict[str, Any]] = field(default_factory=dict)  # overrides of the grid's runs alone


@dataclass
class Section:
    """What holds for all, for one task, or for one model."""

    seeds: list[int] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    variants: list[dict[str, Any]] | None = None


@dataclass
class SweepFile(Section):
    """What a sweep file may say."""

    preset: str = MISSING  # size of every task: full, mini, tiny, or another that they all have
    tasks: list[str] = MISSING  # names in configs/task, or files
    models: list[str] = MISSING  # names in configs/model, or files
    seeds: list[int] | None = MISSING
    threads: int = 1  # of each process
    per_task: dict[str, Section] = field(default_factory=dict)
    per_model: dict[str, Section] = field(default_factory=dict)
    tune: Tune | None = None
    slurm: dict[str, Any] = field(default_factory=dict)

    def pairs(self, folder: Path, words: Sequence[str] = (), only: Collection[int] = ()) -> Iterator[Pair]:
        """Yield every task with every model and variant that has a seed left.

        The sweep's runs lie in ``folder``; ``words`` are further ``key=value`` of all of them; of the seeds, ``only``
        these are run, if it names any.
        """
        for task, model in itertools.product(self.tasks, self.models):
            special = (self.per_task.get(label(task)), self.per_model.get(label(model)))
            sections = [self, *filter(None, special)]
            seeds = [section.seeds for section in sections if section.seeds is not None][-1]  # later ones win
            seeds = [seed for seed in seeds if not only or seed in only]
            variants = [section.variants for section in sections if section.variants]
            for variant in (variants or [[{}]])[-1] if seeds else []:
                layers = (*(section.overrides for section in sections), variant)
                merged = {key: value for layer in layers for key, value in layer.items()}
                keys = {*merged, *(text.partition("=")[0] for text in words)}
                if own := keys & OWN:
                    raise UsageError(f"overrides: expected keys of a run, {', '.join(sorted(own))} is the sweep's own")
                chosen = {"task": task, "model": model, "preset": self.preset, "trainer.threads": self.threads}
                name = "-".join([label(task), self.preset, label(model), *_words(variant)])
                if self.tune and RATE in keys:
                    raise UsageError(f"{RATE}: expected none where rates are tuned ({name}); leave it or tune out")
                run_words = (*_words(chosen | merged), *words)
                yield Pair(name, run_words, resolve(list(run_words)), tuple(seeds), self.tune, folder)


def _words(options: dict[str, Any]) -> list[str]:
    return [f"{key}={plain(value)}" for key, value in options.items()]


@dataclass(frozen=True)
class Job:
    """One run of the sweep."""

    words: tuple[str, ...]  # what chela.train is told
    folder: Path  # of its run
    tunes: bool  # whether it is one of the search for a learning rate
    config: Config = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """Return a name that is unique within the sweep and fit for a file."""
        return "-".join(self.folder.parts[-3 if self.tunes else -2 :])

    def finished(self) -> bool:
        """Whether its result is there, with a test score if the run is to be tested."""
        result = result_in(self.folder)
        return bool(result) and (result.get("test") is not None or not self.config.trainer.test)

    def record_failure(self, status: int | None, error: str) -> None:
        """Record that it failed, and how, so that the table can count it."""
        if not (config := self.folder / "config.yaml").exists():
            write(config, to_yaml(self.config))
        record = {"fingerprint": fingerprint(self.config), "status": status, "error": error}
        write(self.folder / FILES["failed"], json.dumps(record, indent=2) + "\n")


@dataclass(frozen=True)
class Pair:
    """A task with a system: what shares one learning rate."""

    name: str  # fit for a file's name
    words: tuple[str, ...]  # the words of its runs, but for rate and seed
    config: Config  # the configuration that they make
    seeds: tuple[int, ...]
    tuning: Tune | None  # the grid of rates, if there is one
    folder: Path  # the sweep's

    def runs(self, rate: float | None) -> list[Job]:
        """Return the runs of all seeds with the chosen rate (None: the configuration's own)."""
        extra = {} if rate is None else {RATE: rate}
        return [self._job(False, {**extra, "seed": seed}) for seed in self.seeds]

    @cached_property
    def tune(self) -> list[Job]:
        """Return the short runs that choose the rate; none when nothing is tuned."""
        if self.tuning is None:
            return []
        steps = max(1, round(self.tuning.steps * self.config.trainer.max_steps))
        warmup = round(self.tuning.steps * self.config.optimizer.warmup_steps)
        rest = {"trainer.max_steps": steps, "optimizer.warmup_steps": warmup, "trainer.test": False}
        rest |= self.tuning.per_task.get(label(self.config.task.name), {})
        grid = itertools.product(self.tuning.rates, self.tuning.seeds)
        return [self._job(True, {RATE: rate, "seed": seed, **rest}) for rate, seed in grid]

    def _job(self, tunes: bool, changes: dict[str, Any]) -> Job:
        runs = self.folder / TUNE if tunes else self.folder
        words = (*self.words, *_words(changes | {"runs": runs, "resume": "auto"}))
        config = resolve(list(words))
        name = f"{config.model.name}-seed{config.seed}-{fingerprint(config)}"
        return Job(words, runs / f"{label(config.task.name)}-{config.preset}" / name, tunes, config)

    def rate(self, records: dict[str, Any]) -> float | None:
        """Return the rate that was chosen from this very grid; None when none was."""
        record = records.get(self.name, {"grid": []})
        same = [row["fingerprint"] for row in record["grid"]] == [fingerprint(job.config) for job in self.tune]
        return record.get("chosen") if same else None

    def choose_rate(self) -> dict[str, Any]:
        """Return the record of the rate with the best validation score, the mean over the grid's seeds.

        A rate that diverged with one of them is out; nothing where all did.
        """
        grid: list[dict[str, Any]] = []
        totals: dict[float, float] = {}  # by rate, more is better
        for job in self.tune:
            config = job.config
            row: dict[str, Any] = {"rate": config.optimizer.lr, "seed": config.seed}
            row["fingerprint"] = fingerprint(config)
            total = totals.get(row["rate"], 0.0)
            if result := result_in(job.folder):
                name = result["score"]["name"]
                row[f"validation_{name}"] = value = float(result["best_validation"][name])
                totals[row["rate"]] = total + (value if result["score"]["best"] == "max" else -value)
            else:
                row["diverged"] = True
                totals[row["rate"]] = -math.inf
            grid.append(row)
        chosen = max(totals, key=totals.__getitem__)  # the first of the grid among equals
        if totals[chosen] == -math.inf:
            return {}
        return {"chosen": chosen, "steps": self.tune[0].config.trainer.max_steps, "grid": grid}


def read_sweep(path: Path, tasks: Sequence[str] = (), models: Sequence[str] = (), preset: str = "") -> SweepFile:
    """Read a sweep file; UsageError where it cannot be read, or says what no sweep can do.

    Of its ``tasks`` and ``models`` only the given ones are kept, if any are; ``preset`` is taken instead of its own.
    """
    try:
        file = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SweepFile), OmegaConf.load(path)))
    except UNREADABLE as error:
        key = getattr(error, "full_key", None)  # OmegaConf's say which
        where = f"{path}{f', {key}' if key else ''}"
        raise UsageError(f"expected a sweep file at {where} (see docs/sweeps.md), {first_line(error)}") from None
    assert isinstance(file, SweepFile)
    file.preset = preset or file.preset
    file.tasks = _listed(path, "task", file.tasks, file.per_task, tasks)
    file.models = _listed(path, "model", file.models, file.per_model, models)
    return file


def _listed(path: Path, group: str, listed: Sequence[str], special: Collection[str], asked: Sequence[str]) -> list[str]:
    """Return those that are asked for of a file's list; a user's own files lie beside the sweep file."""
    called = [label(name) for name in listed]
    if unknown := set(special) - {*names(group), *called}:
        raise UsageError(f"{path}: per_{group}: expected names of files in configs/{group}, got {', '.join(unknown)}")
    asked = [label(name) for name in asked or listed]
    if unknown := set(asked) - set(called):
        raise UsageError(f"{group}: expected some of the sweep's {', '.join(called)}, got {', '.join(unknown)}")
    kept = [name for name in listed if label(name) in asked]
    return [str((path.parent / name).absolute()) if is_file(name) else name for name in kept]
