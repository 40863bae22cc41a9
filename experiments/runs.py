"""Read run folders and committed results; neither torch nor lightning is imported.

python -m experiments.runs list runs/lra_mini                    one line for each run
python -m experiments.runs collect runs/lra_mini --to experiments/results/lra_mini

``collect`` copies what a table and its figures need (``config.yaml``, ``result.json``, ``metrics.csv``) and a sweep's
choices of learning rates, without checkpoints, and takes the folders of this machine out of the configuration.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from chela.cli import guarded
from chela.config import LATER, identity_of, resolve, to_dict
from chela.errors import UsageError

TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
"""The tasks of the Long Range Arena in the order of its tables; others follow them."""

RATE = "optimizer.lr"
"""The option that a sweep tunes."""

TUNE = "tune"
"""Name of the folder in which a sweep keeps the short runs that chose its learning rates: they are no results."""

_FINGERPRINT = re.compile(r"-([0-9a-f]{8})(?:-\d+)?$")
_RANK = {"finished": 3, "untested": 2, "failed": 1, "unfinished": 0}
_LOCAL = {"runs": "runs", "resume": "none", "data.dir": "", "data.root": None}  # of one machine, and no result of it
_SAID_LAST = (RATE, "trainer.threads", "trainer.accelerator")
_SAME_CELL = {"seed", "preset", "task.name", "model.name", "model.mixer.name"}


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it.

    Args:
        path: The folder.
        state: "finished", "untested" (finished with ``trainer.test=false``), "failed" (a sweep wrote down how) or
            "unfinished".
        config: The resolved configuration by dotted key, without what does not change numbers.
        result: ``result.json``; empty unless finished or untested.
        error: Why it failed, in one line.
    """

    path: Path
    state: str
    config: dict[str, Any] = field(repr=False)
    result: dict[str, Any] = field(repr=False)
    error: str = ""

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.config["task.name"])

    @property
    def model(self) -> str:
        """Name of the system's file."""
        return str(self.config["model.name"])

    @property
    def preset(self) -> str:
        """Size of the task."""
        return str(self.config["preset"])

    @property
    def policy(self) -> str:
        """What the run was validated on: "holdout" or "test"."""
        return str(self.config["data.validation"])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])

    @property
    def fingerprint(self) -> str:
        """Equal for runs that must give equal numbers; the folder's path where none was written down."""
        found = _FINGERPRINT.search(self.path.name)
        return str(self.result.get("fingerprint") or (found.group(1) if found else self.path))

    @property
    def cell(self) -> tuple[tuple[str, str], ...]:
        """Equal for runs that differ by their seed alone."""
        return tuple((key, str(value)) for key, value in self.config.items() if key != "seed")

    def metrics(self, split: str) -> dict[str, list[float]]:
        """Read the columns of ``metrics.csv`` for "train" or "validation"; an absent value is NaN."""
        columns: dict[str, list[float]] = defaultdict(list)
        try:
            with open(self.path / "metrics.csv", encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    if row.pop("split", None) == split and None not in row.values():  # a torn last line is short
                        for key, value in row.items():
                            columns[key].append(float(value) if value else math.nan)
        except FileNotFoundError:
            pass
        except (TypeError, ValueError) as error:
            raise UsageError(f"expected the metrics of a run at {self.path}/metrics.csv, got {error}") from None
        return dict(columns)


def read_runs(paths: Iterable[Path | str]) -> list[Run]:
    """Read every run in and below the folders, each once: the finished one where a run was begun twice.

    Folders called ``tune`` are left out unless they are asked for by name.

    Raises:
        UsageError: A folder is not there, or holds no run.
    """
    kept: dict[str, Run] = {}
    for top in map(Path, paths):
        if not top.is_dir():
            raise UsageError(f"expected the folder of a run, or one above it, there is none at {top}")
        found = [read_run(folder) for folder in _run_folders(top)]
        if not found:
            raise UsageError(f"expected runs in {top}, it holds none (a run has a config.yaml)")
        for run in found:
            other = kept.get(run.fingerprint)
            if other is None or _RANK[run.state] >= _RANK[other.state]:
                kept[run.fingerprint] = run
    return sorted(kept.values(), key=lambda run: (run.preset, task_order(run.task), run.model, run.cell, run.seed))


def _run_folders(top: Path) -> list[Path]:
    """Return the folders of runs; a config.yaml below one, such as wandb's, is none."""
    folders = {path.parent for path in top.rglob("config.yaml")}
    outermost = {folder for folder in folders if folders.isdisjoint(folder.parents)}
    return sorted(folder for folder in outermost if TUNE not in folder.relative_to(top).parts)


def read_run(folder: Path) -> Run:
    """Read one run folder."""
    result, failed = read_json(folder / "result.json"), read_json(folder / "failed.json")
    config = identity_of(LATER | read_config(folder / "config.yaml"))
    missing = {"task.name", "model.name", "preset", "seed", "data.validation"} - set(config)
    if missing:
        raise UsageError(f"expected a run's config.yaml in {folder}, it lacks {', '.join(sorted(missing))}")
    if result:
        return Run(folder, "untested" if result.get("test_accuracy") is None else "finished", config, result)
    if failed:
        return Run(folder, "failed", config, {"fingerprint": failed.get("fingerprint")}, str(failed.get("error", "")))
    return Run(folder, "unfinished", config, {})


def read_config(path: Path) -> dict[str, Any]:
    """Read a stored configuration by dotted key, whatever version of the schema wrote it."""
    try:
        nested = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"expected a run's config.yaml at {path}, could not read it ({error})") from None
    if not isinstance(nested, dict):
        raise UsageError(f"expected a run's config.yaml at {path}, got a {type(nested).__name__}")
    return flat(nested)


def flat(nested: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one by dotted key.

    >>> flat({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    out: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def read_json(path: Path) -> dict[str, Any]:
    """Read a dictionary; an empty one where there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"expected JSON in {path}, could not read it ({error}); remove the file") from None
    if not isinstance(found, dict):
        raise UsageError(f"expected a dictionary in {path}, got a {type(found).__name__}")
    return found


# ---- names and order -------------------------------------------------------------------------------------------------


def task_order(task: str) -> tuple[int, str]:
    """Sort key of a task."""
    return (TASKS.index(task) if task in TASKS else len(TASKS), task)


def labels(runs: Sequence[Run]) -> dict[Path, str]:
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
        usual = {task: _usual(run) for task, run in {run.task: run for run in members}.items()} if keys else {}
        for run in members:
            apart = [key for key in keys if run.config.get(key) != usual[run.task].get(key)]
            words = [f"{key}={_plain(run.config.get(key))}" for key in apart]
            named[run.path] = f"{run.model} [{', '.join(words)}]" if words else run.model
    return named


def _telling_apart(runs: Sequence[Run]) -> list[str]:
    """Return the options that differ between runs of one system on one task."""
    ways: dict[str, dict[Any, dict[str, Any]]] = defaultdict(dict)
    for run in runs:
        ways[run.task][run.cell] = run.config
    keys = [
        key
        for key in dict.fromkeys(key for run in runs for key in run.config if key not in _SAME_CELL)
        if any(len({_values(way, [key]) for way in cells.values()}) > 1 for cells in ways.values())
    ]
    for last in _SAID_LAST:
        fewer = [key for key in keys if key != last]
        if all(len({_values(way, fewer) for way in cells.values()}) == len(cells) for cells in ways.values()):
            keys = fewer
    return keys


def _values(config: dict[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(repr(config.get(key)) for key in keys)


def _usual(run: Run) -> dict[str, Any]:
    """Return what the configuration files say for the run's task, model and preset; nothing for what they know not."""
    try:
        config = resolve([f"task={run.task}", f"model={run.model}", f"preset={run.preset}"])
    except UsageError:
        return {}
    return flat(to_dict(config))


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- commands --------------------------------------------------------------------------------------------------------


def collect(runs: Sequence[Run], to: Path) -> int:
    """Copy the finished and the failed runs' small files to ``to``; return how many."""
    kept = [run for run in runs if run.state in ("finished", "failed")]
    for run in kept:
        name = f"{run.model}-seed{run.seed}-{run.fingerprint}"
        target = to / ("" if run.state == "finished" else "failed") / f"{run.task}-{run.preset}" / name
        target.mkdir(parents=True, exist_ok=True)
        config = OmegaConf.load(run.path / "config.yaml")
        for key, value in _LOCAL.items():
            OmegaConf.update(config, key, value)
        if run.config.get("data.released"):
            OmegaConf.update(config, "data.root", "released")  # not where it lay, but that it was no generated data
        (target / "config.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
        for file in ("result.json", "metrics.csv", "failed.json"):
            if (run.path / file).is_file():
                shutil.copyfile(run.path / file, target / file)
    return len(kept)


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("list", "one line for each run"), ("collect", "copy results without checkpoints")):
        command = commands.add_parser(name, help=about)
        command.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders above them")
        if name == "collect":
            command.add_argument("--to", required=True, type=Path, help="where the copies go")
    asked = parser.parse_args(argv)
    return guarded(lambda: _list(asked.runs) if asked.command == "list" else _collect(asked.runs, asked.to))


def _list(paths: list[str]) -> int:
    for run in read_runs(paths):
        accuracy = f"{run.result['test_accuracy']:.2%}" if run.state == "finished" else "–"
        words = (f"{run.task}-{run.preset}", run.model, f"seed {run.seed}", run.state, accuracy, str(run.path))
        sys.stdout.write("  ".join(words) + (f"  ({run.error})" if run.error else "") + "\n")
    return 0


def _collect(paths: list[str], to: Path) -> int:
    runs = read_runs(paths)
    inside = next((path for path in (*map(Path, paths), *(run.path for run in runs)) if _is_in(path, to)), None)
    if inside is not None:  # a copy would overwrite what it is made from
        raise UsageError(f"--to: expected a folder apart from the runs, got {to}, which holds {inside}; name another")
    copied = collect(runs, to)
    for rates in [file for path in paths for file in Path(path).glob("rates/*.yaml")]:
        (to / "rates").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(rates, to / "rates" / rates.name)
    left = f"; {len(runs) - copied} unfinished or untested left out" if copied < len(runs) else ""
    sys.stdout.write(f"copied {copied} runs to {to}{left}\n")
    return 0


def _is_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


if __name__ == "__main__":
    sys.exit(main())
