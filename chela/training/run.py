"""The run folder, which holds everything that a run leaves behind; and the report at its end.

::

    runs/listops-mini/chela-seed0-1a2b3c4d/
        config.yaml       the resolved configuration
        metrics.csv       a line for each logged step and validation
        result.json       written at the end, once the test set has been seen
        checkpoints/      last.ckpt, previous.ckpt (in case last is torn), best.ckpt (best on validation)
        .lock, .holder    held by the launch that works here, and its process
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.fabric import Fabric
from rich.console import Console
from torch import nn

from chela.config.compose import label, run_folder, to_yaml
from chela.config.identity import fingerprint, own_code
from chela.config.schema import Config
from chela.core.errors import DivergedError, UsageError
from chela.core.files import make_folder, write_whole
from chela.models import build_model
from chela.models.heads import Network, TokenModel
from chela.results import RESULT_FORMAT_VERSION, TITLES, to_the_letter
from chela.training import machine, resume
from chela.training.objectives import Score, above_majority
from chela.training.resume import Stopped
from chela.training.step import LitModel
from lra.datamodule import LRADataModule
from lra.tasks.base import Task

LAST_KEYS = ("step", "model", "optimizer", "state")
WEIGHTS = ("step", "model")  # all that scoring needs
SAMPLE = 400  # symbols that a model of text writes
TOO_EARLY = 100  # steps after the warm-up: before them, nothing learned means nothing


@dataclass
class RunState:
    """What a run remembers beside its weights and its optimiser; a part of every checkpoint."""

    step: int = 0  # steps that are done
    wall_seconds: float = 0.0  # of all launches, up to the checkpoint
    seconds: float = 0.0  # of training, without evaluations
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # targets hit, targets, tokens
    best: dict[str, Any] | None = None  # step and values of the best validation; None before the first
    last: dict[str, Any] = field(default_factory=dict)  # the same of the latest
    arithmetic: str = ""  # what the last digits hang on: see ``machine.arithmetic``


@dataclass
class RunFolder:
    """Paths and files of one run, as listed above."""

    path: Path

    def __post_init__(self) -> None:
        self.config, self.metrics = self.path / "config.yaml", self.path / "metrics.csv"
        self.result = self.path / "result.json"
        self.last, self.previous, self.best = (
            self.path / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous", "best")
        )

    def load_last(self, identity: str, say: Callable[[str], object]) -> dict[str, Any] | None:
        """Read the newest checkpoint that is whole; None when there is none yet, UsageError when all are torn.

        When that is the previous one it takes the place of the torn one, which could otherwise push it out.
        """
        torn = ""
        for path in filter(Path.exists, (self.last, self.previous)):
            try:
                state = resume.load(path, LAST_KEYS, identity)
            except resume.TornError as error:
                torn = torn or str(error)
                continue
            if path == self.previous:
                os.replace(path, self.last)
            if torn:
                say(f"{torn}; going on from the one before it, step {state['step']}")
            return state
        if torn:
            raise UsageError(f"no checkpoint in {self.path} can be read: {torn}; start a new run")
        return None

    def load_weights(self, config: Config, which: str) -> dict[str, Any]:
        """Read a checkpoint's weights: those that did "best" on validation, or the "last"."""
        return resume.load(self.best if which == "best" else self.last, WEIGHTS, fingerprint(config))

    def network(self, config: Config, task: Task, which: str) -> Network:
        """Build the run's network with a checkpoint's weights; UsageError where they are torn, or of another one."""
        model = build_model(config.model, task, config.seed)
        if config.trainer.precision == "64-true":
            model.double()
        weights = self.load_weights(config, which)["model"]
        with resume.loading(self.path):
            model.load_state_dict(weights)
        return model


def find_run(config: Config) -> RunFolder | None:
    """Return the run that ``config`` goes on with; None when it begins a new one.

    auto: the newest such folder; none: the newest that is finished, unless it is to be made again.
    """
    if config.resume not in ("none", "auto"):
        return RunFolder(run_folder(config.resume))
    begun = map(RunFolder, itertools.takewhile(Path.is_dir, _folders(config)))
    fit = [run for run in begun if config.resume == "auto" or (run.result.exists() and not config.again)]
    return fit[-1] if fit else None


@contextlib.contextmanager
def claimed(config: Config, console: Console, leads: bool) -> Iterator[tuple[RunFolder | None, bool]]:
    """Hold the run's folder; remove a new one if the launch fails before anything is in it."""
    if not leads:
        yield None, False
        return
    run, goes_on, lock = claim_run(config)
    console.print(f"{'going on with' if goes_on else 'run'} {run.path}")
    try:
        yield run, goes_on
    except Stopped as stop:
        where = "; nothing new to save" if stop.step is None else f" at step {stop.step}; saved"
        again = f"chela train resume={run.path}{trusted(config)}"
        console.print(f"stopped ({stop.reason}){where}. To go on: {again}")
        raise
    except Exception as error:
        if not (goes_on or run.last.exists() or run.metrics.exists() or isinstance(error, DivergedError)):
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    finally:
        lock.release()


def claim_run(config: Config) -> tuple[RunFolder, bool, FileLock]:
    """Take the run's folder for this launch: ``(folder, goes on, lock)``.

    A new run gets a new folder, numbered when the name is taken. A launch that was killed right after it made the
    folder has begun nothing, and the folder is taken as a new one.
    """
    while (run := find_run(config)) is None:
        path = next(path for path in _folders(config) if config.resume == "auto" or not path.exists())
        make_folder(path.parent, "runs")
        with contextlib.suppress(FileExistsError):  # another launch was faster: look again
            path.mkdir()
            run = RunFolder(path)
            break
    lock = lock_run(run.path)
    run.last.parent.mkdir(exist_ok=True)
    if not (goes_on := run.config.exists()):
        write_whole(run.config, to_yaml(config).encode())  # from now on this is a run
    return run, goes_on, lock


def lock_run(folder: Path) -> FileLock:
    """Hold a run folder while a launch writes into it; UsageError where another does.

    The lock falls with the process, however that ends. A file system without locks is used without one.
    """
    lock, holder = FileLock(folder / ".lock"), folder / ".holder"
    try:
        lock.acquire(blocking=False)
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.exists() else "unknown"
        raise UsageError(
            f"expected that nobody works on {folder}, another launch does ({who}); wait for it or stop it"
        ) from None
    except (NotImplementedError, OSError):
        return lock
    holder.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
    return lock


def _folders(config: Config) -> Iterator[Path]:
    """Yield the folders that runs of this configuration get, in order; a name that a file has is left out."""
    parent = Path(os.path.expanduser(config.runs)) / f"{label(config.task.name)}-{config.preset}"
    stem = f"{config.model.name}-seed{config.seed}-{fingerprint(config)}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return (parent / name for name in names if not (parent / name).is_file())


def trusted(config: Config) -> str:
    """Return the word ``trust=MODULES`` that commands on this run need, if it has a user's own task or system."""
    modules = {name.partition(":")[0] for name in (config.task.name, config.model.mixer.name) if ":" in name}
    return f" trust={','.join(sorted(modules))}" if modules else ""


# ---- the end ----


def result_of(
    fabric: Fabric, module: LitModel, data: LRADataModule, state: RunState, tests: dict[str, Any], wall_seconds: float
) -> dict[str, Any]:
    """Return what ``result.json`` holds; ``tests`` has what ``score.scored`` says of each test set."""
    config, task, objective, best = module.config, data.task, module.objective, state.best
    assert best is not None
    tests = {f"test_{split}": found | {"count": int(found["count"])} for split, found in tests.items()}
    test, by = tests.pop("test_test", None), f"by_{task.grouped_by}"
    if test and by in test:
        tests[f"test_{by}"] = test.pop(by)
    learned = above_majority(best, data.records("validation").majority_accuracy())
    early = state.step < config.optimizer.warmup_steps + TOO_EARLY
    some: dict[str, Any] = {"sample": sample(module.model, task), "context": task.context, "own_code": own_code(config)}
    some |= {"lra": to_the_letter(config)} if config.task.name in TITLES else {}
    return {
        "format_version": RESULT_FORMAT_VERSION,
        "task": config.task.name,
        "task_title": task.title,
        "model": config.model.name,
        "preset": config.preset,
        "seed": config.seed,
        "fingerprint": fingerprint(config),
        "objective": task.objective,
        "score": dataclasses.asdict(objective.score),
        "steps": state.step,
        "epochs": data.records("train").epochs(state.step * config.trainer.batch_size),
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "best_step": best["step"],
        "best_validation": {name: best[name] for name in objective.columns},
        "last_validation": {name: state.last[name] for name in objective.columns},
        "test": test,
        "majority_accuracy": data.records("test").majority_accuracy() if test else None,
        "validation_policy": config.data.validation,
        "data_note": task.note,
        "learned": learned or (None if early else False),
        "wall_seconds": round(wall_seconds, 1),
        "training_seconds": round(state.seconds, 1),
        "tokens_per_second": round(state.totals[2] / max(state.seconds, 1e-9)),
        "peak_memory_bytes": machine.peak_memory_bytes(fabric.device),
        "precision": fabric.strategy.precision.precision,
        "processes": fabric.world_size,
        **machine.describe(fabric.device),
        **{key: value for key, value in some.items() if value or value is False},
        **tests,
    }


def sample(model: nn.Module, task: Any) -> str:
    """Return a text that a model of text writes; empty for other networks, and for those without states."""
    if not getattr(task, "alphabet", "") or not isinstance(model, TokenModel):
        return ""
    from chela.models.generate import generate  # imported here: other tasks do not need it

    symbols = min(SAMPLE, task.l_max) if model.backbone.ends() else SAMPLE
    with contextlib.suppress(UsageError):  # a system of somebody's own without states
        return str(generate(model.eval(), task.before.decode(), symbols, temperature=0.8))[1:]
    return ""


def report(console: Console, config: Config, run: RunFolder, result: dict[str, Any]) -> None:
    """Print a result, and the commands that go on from it."""
    lra = ""
    if "lra" in result:
        why = " begun with other weights" if config.weights else " is another task than that of full"
        lra = f"  ({result['preset']}{why}: not an LRA number)"
        if result["lra"]:
            lra = f"  (LRA's task; {result['parameters']:,} parameters; {result['epochs']:.3g} epochs)"
    score, test = Score(**result["score"]), result["test"]
    tested = "test set left unseen (trainer.test=false)"
    if test is not None:
        accuracy = "" if score.name == "accuracy" else f"accuracy {test.get('accuracy', math.nan):.2%}, "
        tested = f"test {score.text(test)} ({accuracy}majority class {result['majority_accuracy']:.2%})"
    console.print(
        f"{result['task']} {result['preset']} {result['model']} seed {result['seed']}: {tested}, "
        f"best validation {score.text(result['best_validation']).removeprefix('accuracy ')} at step "
        f"{result['best_step']}, validation policy {result['validation_policy']}{lra}"
    )
    for name in (key for key, found in result.items() if key.startswith("test_") and "count" in found):
        console.print(f"{name}: {score.text(result[name])} of {result[name]['count']:,}")
    if result["learned"] is False:
        console.print(
            "warning: the best validation accuracy is within luck of the majority class. Usual causes: a learning rate "
            "too high or too low, a warm-up too short, the norm (try model.norm=batch), too few steps"
        )
    where = f"{run.path}{trusted(config)}"
    if result.get("data_note"):
        console.print(f"data: {result['data_note']}")
    if result.get("context"):
        console.print(f"context: {result['context']}\ngenerate: chela generate run={where}")
    console.print(f"evaluate: chela evaluate run={where}\nresume:   chela train resume={where}")
    console.print(f"plot:     chela report {run.path} out=curves.png")
