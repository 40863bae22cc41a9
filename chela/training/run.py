"""The run folder: where everything that a run leaves behind lies.

::

    runs/listops-mini/chela-seed0-1a2b3c4d/
        config.yaml       the resolved configuration
        metrics.csv       a line for each logged step and validation
        result.json       written at the end, once the test set has been seen
        checkpoints/      last.ckpt, previous.ckpt (in case last is torn), best.ckpt (best on validation)
        .lock             held by the launch that works here
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chela.config import fingerprint, run_folder, to_yaml
from chela.errors import UsageError
from chela.schema import Config
from chela.training import checkpoint
from chela.training.lock import RunLock

RESULT_FORMAT_VERSION = 1

LAST_KEYS = ("step", "model", "optimizer", "best", "latest", "wall_seconds", "parts")
BEST_KEYS = ("step", "model", "accuracy")


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The metrics."""
        return self.path / "metrics.csv"

    @property
    def result(self) -> Path:
        """The result, there only when the run has ended."""
        return self.path / "result.json"

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def previous(self) -> Path:
        """The checkpoint before it."""
        return self.path / "checkpoints" / "previous.ckpt"

    @property
    def best(self) -> Path:
        """The weights that did best on validation."""
        return self.path / "checkpoints" / "best.ckpt"

    def create(self, config: Config) -> None:
        """Write the configuration: from now on this is a run."""
        checkpoint.write_whole(self.config, to_yaml(config).encode())

    def load_last(self, identity: str, say: Callable[[str], object]) -> dict[str, Any] | None:
        """Read the newest checkpoint that is whole; None when there is none yet.

        When that is the previous one it takes the place of the torn one, which could otherwise push it out.

        Args:
            identity: Fingerprint of the run's configuration.
            say: Prints a line.

        Raises:
            UsageError: There are checkpoints and not one of them can be read.
        """
        torn: list[str] = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                state = checkpoint.load(path, LAST_KEYS, identity)
            except checkpoint.TornError as error:
                torn.append(str(error))
                continue
            if path == self.previous:
                os.replace(path, self.last)
            if torn:
                say(f"{torn[0]}; going on from the one before it, step {state['step']}")
            return state
        if torn:
            raise UsageError(f"no checkpoint in {self.path} can be read: {torn[0]}; start a new run")
        return None

    def load_best(self, identity: str) -> dict[str, Any]:
        """Read the weights that did best on validation."""
        return checkpoint.load(self.best, BEST_KEYS, identity)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write ``result.json``."""
        text = json.dumps({"format_version": RESULT_FORMAT_VERSION, **result}, indent=2) + "\n"
        checkpoint.write_whole(self.result, text.encode())

    def read_result(self) -> dict[str, Any]:
        """Read ``result.json``.

        Raises:
            UsageError: It is not there, does not parse, or is of another format version.
        """
        try:
            result: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
            version = result["format_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"expected the result of a finished run at {self.result}, could not read it "
                f"({type(error).__name__}: {error}); delete it and resume the run to have it written anew"
            ) from None
        if version != RESULT_FORMAT_VERSION:
            raise UsageError(
                f"expected format version {RESULT_FORMAT_VERSION} in {self.result}, got {version!r}; "
                "use the version of chela that wrote it"
            )
        return result


def open_run(path: Path | str) -> RunFolder:
    """Return the run that lies at ``path``.

    Raises:
        UsageError: The folder is not there or holds no run.
    """
    return RunFolder(run_folder(path))


def find_run(config: Config) -> RunFolder | None:
    """Return the run that ``config`` goes on with; None when it begins a new one.

    ``resume=auto`` takes the newest folder with the same fingerprint.
    """
    if config.resume not in ("none", "auto"):
        return open_run(config.resume)
    found = None
    if config.resume == "auto":
        for path in _folders(config):
            if not path.is_dir():
                break
            found = RunFolder(path)
    return found


def claim_run(config: Config) -> tuple[RunFolder, bool, RunLock]:
    """Take the run's folder for this launch: ``(folder, goes on, lock)``.

    A new run gets a new folder, numbered when the name is taken.

    Raises:
        UsageError: The folder cannot be written, or another launch works in it.
    """
    try:
        while True:
            run = find_run(config) or _make_folder(config)
            if run is not None:
                break
        lock = RunLock(run.path)
        (run.path / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"runs: expected a folder that can be written, got {error.filename} ({error.strerror}); set runs=FOLDER"
        ) from None
    goes_on = run.config.exists()  # a launch that was killed right after it made the folder has begun nothing
    if not goes_on:
        run.create(config)
    return run, goes_on, lock


def _make_folder(config: Config) -> RunFolder | None:
    for path in _folders(config):
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
        except FileExistsError:  # another launch was faster: look again
            return None
        return RunFolder(path)
    raise AssertionError("the names do not end")


def _folders(config: Config) -> Iterator[Path]:
    """Name the folders that runs of this configuration get, in order."""
    parent = Path(os.path.expanduser(config.runs)) / f"{config.task.name}-{config.preset}"
    stem = f"{config.model.name}-seed{config.seed}-{fingerprint(config)}"
    yield parent / stem
    for number in itertools.count(2):
        yield parent / f"{stem}-{number}"
