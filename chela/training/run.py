"""The run folder: where everything that a run leaves behind lies.

::

    runs/listops-mini/chela-seed0-1a2b3c4d/
        config.yaml       the resolved configuration
        metrics.csv       a line for each logged step and validation
        result.json       written at the end, once the test set has been seen
        checkpoints/      last.ckpt, previous.ckpt (in case last is torn), best.ckpt (best on validation)
        .lock             held by the launch that works here
        .holder           which launch that is
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from torch import nn

from chela.config.compose import run_folder, to_yaml
from chela.config.groups import label
from chela.config.identity import fingerprint
from chela.config.schema import Config
from chela.core.errors import DivergedError, UsageError
from chela.core.files import write_whole
from chela.results import RESULT_FORMAT_VERSION
from chela.training import resume
from chela.training.resume import Stopped

LAST_KEYS = ("step", "model", "optimizer", "state")
WEIGHTS = ("step", "model")  # all that scoring needs


@dataclass
class RunState:
    """What a run remembers beside its weights and its optimiser; a part of every checkpoint."""

    step: int = 0  # steps that are done
    wall_seconds: float = 0.0  # of all launches, up to the checkpoint
    seconds: float = 0.0  # of training, without evaluations
    evaluation_seconds: float = 0.0
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # targets hit, targets, tokens
    best: dict[str, Any] | None = None  # step and values of the best validation; None before the first
    last: dict[str, Any] = field(default_factory=dict)  # the same of the latest
    window: list[float] = field(default_factory=lambda: [0.0, 0.0])  # totals where the chance watch's window began
    learned: bool | None = None  # whether training ever left the majority class; None: too early to tell
    warned: bool = False  # that it did not


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

    def create(self, config: Config) -> None:
        """Write the configuration: from now on this is a run."""
        write_whole(self.config, to_yaml(config).encode())

    def load_last(self, identities: Collection[str], say: Callable[[str], object]) -> dict[str, Any] | None:
        """Read the newest checkpoint that is whole; None when there is none yet.

        When that is the previous one it takes the place of the torn one, which could otherwise push it out.

        Raises:
            UsageError: There are checkpoints and not one of them can be read.
        """
        torn = ""
        for path in filter(Path.exists, (self.last, self.previous)):
            try:
                state = resume.load(path, LAST_KEYS, identities)
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
        return resume.load(self.best if which == "best" else self.last, WEIGHTS, [fingerprint(config)])

    def load_into(self, model: nn.Module, config: Config, which: str) -> None:
        """Give a network the weights of a checkpoint.

        Raises:
            UsageError: They are torn, or of another network.
        """
        weights = self.load_weights(config, which)["model"]
        try:
            model.load_state_dict(weights)
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UsageError(
                f"expected weights of this run's network in {self.path}, got others ({reason}); "
                "use the version of chela that wrote them"
            ) from None

    def write_result(self, result: dict[str, Any]) -> None:
        """Write ``result.json``."""
        text = json.dumps({"format_version": RESULT_FORMAT_VERSION, **result}, indent=2) + "\n"
        write_whole(self.result, text.encode())


def find_run(config: Config) -> RunFolder | None:
    """Return the run that ``config`` goes on with; None when it begins a new one.

    ``resume=auto`` takes the newest folder with the same fingerprint.

    Raises:
        UsageError: The folder that is named is not there or holds no run.
    """
    if config.resume not in ("none", "auto"):
        return RunFolder(run_folder(config.resume))
    begun = list(itertools.takewhile(Path.is_dir, _folders(config))) if config.resume == "auto" else []
    return RunFolder(begun[-1]) if begun else None


@contextlib.contextmanager
def claimed(config: Config, console: Console, leads: bool) -> Iterator[tuple[RunFolder | None, bool]]:
    """Hold the run's folder; take a new one back when the launch fails before there is anything in it."""
    run, goes_on, lock = claim_run(config) if leads else (None, False, None)
    if run is None or lock is None:
        yield None, False
        return
    console.print(f"{'going on with' if goes_on else 'run'} {run.path}")
    try:
        yield run, goes_on
    except Stopped as stop:
        where = "; nothing new to save" if stop.step is None else f" at step {stop.step}; saved"
        again = f"python -m chela.train resume={run.path}{trusted(config)}"
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

    Raises:
        UsageError: The folder cannot be written, or another launch works in it.
    """
    try:
        while (run := find_run(config)) is None:
            path = next(path for path in _folders(config) if config.resume == "auto" or not path.exists())
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another launch was faster: look again
                path.mkdir()
                run = RunFolder(path)
                break
        lock = lock_run(run.path)
        run.last.parent.mkdir(exist_ok=True)
        goes_on = run.config.exists()
        if not goes_on:
            run.create(config)
    except OSError as error:
        raise UsageError(
            f"runs: expected a folder that can be written, got {error.filename} ({error.strerror}); set runs=FOLDER"
        ) from None
    return run, goes_on, lock


def lock_run(folder: Path) -> FileLock:
    """Hold a run folder while a launch writes into it; the lock falls with the process, however that ends.

    A file system without locks is used without one.

    Raises:
        UsageError: Another launch holds it.
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
    """Name the folders that runs of this configuration get, in order; a file may be in the way."""
    parent = Path(os.path.expanduser(config.runs)) / f"{label(config.task.name)}-{config.preset}"
    stem = f"{config.model.name}-seed{config.seed}-{fingerprint(config)}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return (parent / name for name in names if not (parent / name).is_file())


def trusted(config: Config) -> str:
    """Return the word that lets a run folder name the modules that this run's words named."""
    modules = {name.partition(":")[0] for name in (config.task.name, config.model.mixer.name) if ":" in name}
    return f" trust={','.join(sorted(modules))}" if modules else ""
