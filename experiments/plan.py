"""From a sweep file to runs: task × model × variant × seed, each a resolved configuration.

A sweep file::

    preset: mini
    tasks: [listops, image]
    models: [chela, softmax]
    seeds: [0, 1]
    threads: 1                                    # of each run; part of what makes its numbers
    overrides: {trainer.val_every: 100}           # for every run; later ones win, in the order of this file
    per_task: {listops: {seeds: [0, 1, 2], overrides: {trainer.max_steps: 1500}}}   # or variants, or a tune of its own
    per_model: {chela: {variants: [{}, {model.mixer.normalize: false}]}}   # each is a row of its own
    tune: {rates: [2e-3, 5e-4, 8e-3], seed: 0, steps: 0.25}
    slurm: {time: 60, partition: gpu}             # words of submitit's SlurmExecutor
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from chela.config import fingerprint, names, resolve, seconds
from chela.errors import UsageError
from chela.schema import Config
from experiments.runs import RATE, TUNE, read_json

PRESETS = ("full", "mini", "tiny")


@dataclass
class Tune:
    """The same grid of learning rates for every system; the best on validation is taken, the first among equals.

    Args:
        rates: The grid.
        seed: The one seed of the grid's runs.
        steps: Share of the run's steps that each of them takes, its schedule included.
    """

    rates: list[float] = MISSING
    seed: int = 0
    steps: float = 1.0


@dataclass
class Part:
    """What holds for one task or one model."""

    seeds: list[int] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    variants: list[dict[str, Any]] | None = None
    tune: Tune | None = None


@dataclass
class SweepFile:
    """What a sweep file may say."""

    preset: str = MISSING
    tasks: list[str] = MISSING
    models: list[str] = MISSING
    seeds: list[int] = MISSING
    threads: int = 1
    jobs: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    per_task: dict[str, Part] = field(default_factory=dict)
    per_model: dict[str, Part] = field(default_factory=dict)
    variants: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    tune: Tune | None = None
    slurm: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run of the sweep.

    Args:
        words: What ``chela.train`` is told.
        folder: Where its run folder lies, unless the name was taken and numbered.
        config: The resolved configuration.
    """

    words: tuple[str, ...]
    folder: Path
    config: Config = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """Short and unique within the sweep, fit for a file's name."""
        stage = f"{TUNE}-" if self.tunes else ""
        return f"{stage}{self.folder.parent.name}-{self.folder.name}"

    @property
    def tunes(self) -> bool:
        """Whether it belongs to the search for a learning rate."""
        return self.folder.parent.parent.name == TUNE

    @property
    def fingerprint(self) -> str:
        """The configuration's hash."""
        return fingerprint(self.config)

    def run_folder(self) -> Path | None:
        """Return the folder of the finished run, else the newest begun, else None."""
        found = sorted(self.folder.parent.glob(f"{self.folder.name}*"), key=lambda path: (len(path.name), path.name))
        finished = [path for path in found if (path / "result.json").is_file()]
        return (finished or found)[-1] if found else None

    def finished(self) -> bool:
        """Whether its result is there, and the test accuracy in it if the run is to be tested."""
        run = self.run_folder()
        result = read_json(run / "result.json") if run else {}
        return bool(result) and (result.get("test_accuracy") is not None or not self.config.trainer.test)

    def step(self) -> int:
        """Return the last step that its metrics tell of."""
        run = self.run_folder()
        try:
            with open((run or self.folder) / "metrics.csv", "rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - 400))
                whole = file.read().decode(errors="replace").split("\n")[:-1]  # the last piece may be torn
            return int(whole[-1].split(",")[0]) if whole else 0
        except (OSError, ValueError):
            return 0


@dataclass(frozen=True)
class Pair:
    """A task with a system: what shares one learning rate.

    Args:
        name: Fit for a file's name.
        words: What every run of it is told, but for rate and seed.
        config: What they resolve to.
        seeds: Of the runs.
        tuning: The grid of rates, if there is one.
        folder: The sweep's folder.
    """

    name: str
    words: tuple[str, ...]
    config: Config
    seeds: tuple[int, ...]
    tuning: Tune | None
    folder: Path

    def runs(self, rate: float | None) -> tuple[Job, ...]:
        """Return the runs of all seeds with the chosen rate (None: the configuration's own)."""
        extra = {} if rate is None else {RATE: rate}
        return tuple(self._job(self.folder, {**extra, "seed": seed}) for seed in self.seeds)

    @cached_property
    def tune(self) -> tuple[Job, ...]:
        """The short runs that choose the rate; none when nothing is tuned."""
        if self.tuning is None:
            return ()
        steps = max(1, round(self.tuning.steps * self.config.trainer.max_steps))
        rest = {"seed": self.tuning.seed, "trainer.max_steps": steps, "trainer.test": False}
        return tuple(self._job(self.folder / TUNE, {RATE: rate, **rest}) for rate in self.tuning.rates)

    def _job(self, runs: Path, changes: dict[str, Any]) -> Job:
        config = copy.deepcopy(self.config)  # resolving the words anew would take a hundred times as long
        for key, value in changes.items():
            *sections, name = key.split(".")
            setattr(functools.reduce(getattr, sections, config), name, value)
        folder = runs / f"{config.task.name}-{config.preset}"
        words = (
            *self.words,
            *(f"{key}={_word(value)}" for key, value in changes.items()),
            f"runs={runs}",
            "resume=auto",
        )
        return Job(words, folder / f"{config.model.name}-seed{config.seed}-{fingerprint(config)}", config)


@dataclass(frozen=True)
class Plan:
    """A sweep file with the command line's words: ``pairs()`` is the work to do."""

    file: SweepFile
    folder: Path
    words: tuple[str, ...] = ()

    def pairs(self) -> Iterator[Pair]:
        """Yield every task with every model and variant that has a seed left."""
        file = self.file
        for task in file.tasks:
            for model in file.models:
                if self._said("seeds", task, model):
                    for variant in self._said("variants", task, model):
                        yield self._pair(task, model, variant)

    def _said(self, key: str, task: str, model: str) -> Any:
        """Return what is said for the model, else for the task, else for all."""
        parts = (self.file.per_model.get(model), self.file.per_task.get(task))
        said = (getattr(part, key) for part in (*parts, self.file) if part)
        return next((value for value in said if value is not None), None)

    def _pair(self, task: str, model: str, variant: dict[str, Any]) -> Pair:
        file = self.file
        parts = [part for part in (file.per_task.get(task), file.per_model.get(model)) if part]
        layers = [file.overrides, *(part.overrides for part in parts), variant]
        merged = {key: value for layer in layers for key, value in layer.items()}
        words = (
            f"task={task}",
            f"model={model}",
            f"preset={file.preset}",
            f"trainer.threads={file.threads}",
            *(f"{key}={_word(value)}" for key, value in merged.items()),
            *self.words,
        )
        name = "-".join([task, file.preset, model, *(f"{key}={_word(value)}" for key, value in variant.items())])
        seeds, tune = tuple(self._said("seeds", task, model)), self._said("tune", task, model)
        if tune and any(word.startswith(f"{RATE}=") for word in words):
            raise UsageError(f"{RATE}: expected none where rates are tuned ({name}); leave out that word or tune")
        return Pair(name, words, resolve(list(words)), seeds, tune, self.folder)


def _word(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_plan(path: Path, folder: Path, chosen: dict[str, str], words: list[str]) -> Plan:
    """Read a sweep file.

    Args:
        path: The file.
        folder: Where the sweep's runs lie.
        chosen: Parts of the grid that the command line asks for: ``task``, ``model``, ``seed`` (comma-separated), and
            ``preset``.
        words: Further ``key=value`` of every run.

    Raises:
        UsageError: The file cannot be read, or says what no sweep can do.
    """
    try:
        loaded = OmegaConf.merge(OmegaConf.structured(SweepFile), OmegaConf.load(path))
        file = OmegaConf.to_object(loaded)
    except (OSError, YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"expected a sweep file at {path} (see docs/sweeps.md), {reason}") from None
    assert isinstance(file, SweepFile)
    file.preset = chosen.get("preset", file.preset)
    file.tasks = _narrowed("task", file.tasks, chosen)
    file.models = _narrowed("model", file.models, chosen)
    if "seed" in chosen:
        everywhere = {seed for part in [*file.per_task.values(), *file.per_model.values()] for seed in part.seeds or ()}
        asked = [int(seed) for seed in _narrowed("seed", [str(seed) for seed in {*file.seeds, *everywhere}], chosen)]
        file.seeds = [seed for seed in file.seeds if seed in asked]
        for part in (*file.per_task.values(), *file.per_model.values()):
            part.seeds = part.seeds and [seed for seed in part.seeds if seed in asked]
    _check(file)
    _check_overrides({key: value for key, _, value in (word.partition("=") for word in words)})
    return Plan(file, folder, tuple(words))


def _narrowed(group: str, listed: list[str], chosen: dict[str, str]) -> list[str]:
    if group not in chosen:
        return listed
    asked = chosen[group].split(",")
    unknown = [name for name in asked if name not in listed]
    if unknown:
        raise UsageError(f"{group}: expected some of the sweep's {', '.join(listed)}, got {', '.join(unknown)}")
    return [name for name in listed if name in asked]


def _check(file: SweepFile) -> None:
    if file.preset not in PRESETS:
        raise UsageError(f"preset: expected one of {', '.join(PRESETS)} in a sweep, got {file.preset!r}")
    if file.threads < 1:
        raise UsageError(f"threads: expected 1 or more, got {file.threads}")
    for group, listed, parts in (("task", file.tasks, file.per_task), ("model", file.models, file.per_model)):
        doubled = sorted({name for name in listed if listed.count(name) > 1})
        if doubled:
            raise UsageError(f"{group}s: expected each once, got {', '.join(doubled)} again")
        unknown = [name for name in parts if name not in names(group)]
        if unknown:
            raise UsageError(f"per_{group}: expected names of files in configs/{group}, got {', '.join(unknown)}")
        for part in parts.values():
            for overrides in (part.overrides, *(part.variants or [])):
                _check_overrides(overrides)
    for overrides in (file.overrides, *file.variants):
        _check_overrides(overrides)
    if any(seed < 0 for seed in file.seeds):
        raise UsageError(f"seeds: expected numbers from 0, got {file.seeds}")
    for tune in (file.tune, *(part.tune for part in (*file.per_task.values(), *file.per_model.values()))):
        if tune:
            _check_tune(tune)


def _check_tune(tune: Tune) -> None:
    if tune.seed < 0:
        raise UsageError(f"tune.seed: expected a number from 0, got {tune.seed}")
    if any(not 0 < rate <= 10 for rate in tune.rates):
        raise UsageError(f"tune.rates: expected rates in (0, 10], got {tune.rates}")
    if not tune.rates or not 0 < tune.steps <= 1:
        raise UsageError("tune: expected at least one of rates, and steps as a share in (0, 1]")


def _check_overrides(overrides: dict[str, Any]) -> None:
    own = sorted({"task", "model", "preset", "seed", "runs", "resume", "trainer.threads"} & set(overrides))
    if own:
        raise UsageError(f"overrides: expected keys of a run, {', '.join(own)} is set by the sweep itself")
    seconds(str(overrides.get("trainer.max_time", "")))
