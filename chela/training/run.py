"""The run folder: where everything that a run leaves behind lies.

::

    runs/listops-mini/chela-seed0-1a2b3c4d/
        config.yaml       the resolved configuration
        metrics.csv       a line for each logged step and validation
        result.json       written at the end, once the test set has been seen
        checkpoints/      last.ckpt, previous.ckpt (in case last is torn), best.ckpt (best on validation)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chela.config import fingerprint, to_yaml
from chela.errors import UsageError
from chela.schema import Config
from chela.training import checkpoint

RESULT_FORMAT_VERSION = 1


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
        """Make the folder and write the configuration."""
        try:
            self.last.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"runs: expected a folder that can be written, got {self.path} ({error.strerror}); set runs=FOLDER"
            ) from None
        checkpoint.write_whole(self.config, lambda path: path.write_text(to_yaml(config)))

    def load_last(self, say: Callable[[str], object]) -> dict[str, Any] | None:
        """Read the newest checkpoint that is whole; None when there is none yet.

        Raises:
            UsageError: There are checkpoints and not one of them can be read.
        """
        errors = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                state = checkpoint.load(path)
            except UsageError as error:
                errors.append(str(error))
                continue
            if errors:
                say(f"{errors[0]}; going on from {path.name}, step {state['step']}")
            return state
        if errors:
            raise UsageError(f"resume: no checkpoint in {self.path} can be read: {errors[0]}")
        return None

    def write_result(self, result: dict[str, Any]) -> None:
        """Write ``result.json``."""
        text = json.dumps({"format_version": RESULT_FORMAT_VERSION, **result}, indent=2) + "\n"
        checkpoint.write_whole(self.result, lambda path: path.write_text(text))

    def read_result(self) -> dict[str, Any]:
        """Read ``result.json``."""
        try:
            result: dict[str, Any] = json.loads(self.result.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(
                f"expected the result of a finished run at {self.result} ({error}); resume the run first"
            ) from None
        return result


def open_run(path: Path | str) -> RunFolder:
    """Return the run that lies at ``path``.

    Raises:
        UsageError: The folder is not there or holds no run.
    """
    run = RunFolder(Path(path))
    if not run.path.is_dir():
        raise UsageError(f"run: expected the folder of a run, there is none at {path}")
    if not run.config.is_file():
        raise UsageError(f"run: expected the folder of a run, {path} holds no config.yaml")
    return run


def find_run(config: Config) -> tuple[RunFolder, bool]:
    """Choose the folder of this run: ``(folder, goes on)``.

    ``resume=auto`` takes the newest folder with the same fingerprint; otherwise a new one is made, numbered when the
    name is taken.
    """
    if config.resume not in ("none", "auto"):
        return open_run(config.resume), True
    stem = f"{config.model.name}-seed{config.seed}-{fingerprint(config)}"
    parent = Path(config.runs) / f"{config.task.name}-{config.preset}"
    number = 1
    while (parent / _numbered(stem, number)).exists():
        number += 1
    if config.resume == "auto" and number > 1:
        return open_run(parent / _numbered(stem, number - 1)), True
    return RunFolder(parent / _numbered(stem, number)), False


def _numbered(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}-{number}"
