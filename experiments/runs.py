"""Read run folders and committed results; neither torch nor lightning is imported.

chela runs                                                          how far each run in runs/ is, and which still go
chela runs status runs/lra_mini                                     the same of others
chela runs list runs/lra_mini                                       one line for each run
chela runs collect runs/lra_mini to=experiments/results/lra_mini    copies without checkpoints

``collect`` copies what a table and its figures need (``config.yaml``, ``result.json``, ``metrics.csv``, and where they
are ``probe.json`` and ``length.json``) and a sweep's choices of learning rates. It takes the folders of this machine
out of the configuration.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from chela import cli, results
from chela.core.errors import UsageError
from chela.core.files import write_whole
from chela.core.options import option
from chela.groups import flat, label
from chela.identity import identity_of
from chela.results import ACCURACY, GROUPS, TITLES

if TYPE_CHECKING:
    import pandas as pd

TASKS = tuple(TITLES)  # of the Long Range Arena in the order of its tables
_ORDER = [task for group in GROUPS.values() for task in group]  # others follow these
RATE = "optimizer.lr"  # what a sweep tunes
TUNE = "tune"  # folder in which a sweep keeps the short runs that chose its learning rates: they are no results
_FINGERPRINT = re.compile(r"-([0-9a-f]{8})(?:-\d+)?$")
PROBE = "probe.json"  # what its attention adds, written by chela probe
LENGTH = "length.json"  # bits by window and by position, written by chela length
_RANK = ("unfinished", "failed", "untested", "finished")  # of two folders of one run the later state counts
_LOCAL = {"runs": "runs", "resume": "none", "data.dir": "", "data.root": None}  # of one machine, and no result of it
NOT_MEASURED = ("step", "split", "lr", "tokens_per_second", "seconds", "evaluation")  # columns of metrics.csv


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it; ``score``, ``value`` and ``title`` are how tables show it."""

    path: Path
    state: str  # "finished", "untested" (trainer.test=false), "failed" (a sweep wrote down how) or "unfinished"
    config: dict[str, Any] = field(repr=False)  # by dotted key, without what does not change numbers
    result: dict[str, Any] = field(repr=False)  # in the form of version 2; empty unless finished or untested
    error: str  # why it failed, in one line
    fingerprint: str  # equal for runs that must give equal numbers; the folder's path where none was written down
    task: str  # of "my_module:MyTask" what follows the colon
    model: str
    preset: str
    policy: str  # what it was validated on: "holdout" or "test"
    seed: int

    @property
    def title(self) -> str:
        """Return the task's title in tables."""
        return str(self.result.get("task_title") or TITLES.get(self.task, self.task))

    @property
    def edition(self) -> int:
        """Return which edition of the mini tasks it is of."""
        return int(self.config.get("edition", 1))

    @property
    def score(self) -> dict[str, Any]:
        """Return how the task is scored: name, unit, scale, digits and the better direction ("max" or "min")."""
        return dict(self.result.get("score", ACCURACY))

    @property
    def value(self) -> float:
        """Return a finished run's score on the test set, in the score's unit."""
        return float(self.score["scale"] * self.result["test"][self.score["name"]])

    @property
    def cell(self) -> tuple[tuple[str, str], ...]:
        """Return what is equal for runs that differ by their seed alone."""
        return tuple((key, str(value)) for key, value in self.config.items() if key != "seed")

    @property
    def probe(self) -> dict[str, Any]:
        """Return what ``chela probe`` measured of the run; empty where it was not asked."""
        return read_json(self.path / PROBE)

    def metrics(self, split: str) -> pd.DataFrame:
        """Read the lines of ``metrics.csv`` for "train" or "validation"; empty where there are none."""
        import pandas as pd

        try:
            text = (self.path / "metrics.csv").read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # the last line may be torn
            frame = pd.read_csv(io.StringIO(whole or "split\n"))
            return frame[frame.pop("split") == split].astype(float).reset_index(drop=True)
        except FileNotFoundError:
            return pd.DataFrame()
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"expected the metrics of a run at {self.path}/metrics.csv, got {error}") from None


def read_runs(paths: Iterable[Path | str]) -> list[Run]:
    """Read every run in and below the folders, each once: the finished one where a run was begun twice.

    Folders called ``tune`` are left out unless they are asked for by name. UsageError where one holds no run.
    """
    kept: dict[str, Run] = {}
    for top in map(Path, paths):
        if not top.is_dir():
            raise UsageError(f"expected the folder of a run, or one above it, there is none at {top}")
        if not (found := [read_run(folder) for folder in _run_folders(top)]):
            raise UsageError(f"expected runs in {top}, it holds none (a run has a config.yaml)")
        for run in found:
            other = kept.get(run.fingerprint)
            if other is None or _RANK.index(run.state) >= _RANK.index(other.state):
                kept[run.fingerprint] = run
    return sorted(kept.values(), key=lambda run: (run.preset, task_order(run.task), run.model, run.cell, run.seed))


def _run_folders(top: Path) -> list[Path]:
    """Return the folders of runs; a config.yaml below one, such as wandb's, is none."""
    folders = {path.parent for path in top.rglob("config.yaml")}
    outermost = {folder for folder in folders if folders.isdisjoint(folder.parents)}
    return sorted(folder for folder in outermost if TUNE not in folder.relative_to(top).parts)


def read_run(folder: Path) -> Run:
    """Read one run folder."""
    result, failed = read_result(folder), read_json(folder / "failed.json")
    path = folder / "config.yaml"
    config = identity_of(flat(_read(path, lambda: OmegaConf.to_container(OmegaConf.load(path)))))
    if "own_code" in result:  # edited code is another row
        config["own_code"] = ",".join(result["own_code"].values())
    needed = ("task.name", "model.name", "preset", "data.validation", "seed")
    if missing := sorted(set(needed) - set(config)):
        raise UsageError(f"expected a run's config.yaml in {folder}, it lacks {', '.join(missing)}")
    task, model, preset, policy = (label(str(config[key])) for key in needed[:-1])
    state = "failed" if failed else "unfinished"
    if result:
        state = "finished" if result.get("test") else "untested"
    in_name = _FINGERPRINT.search(folder.name)
    mark = (result or failed).get("fingerprint") or (in_name[1] if in_name else folder)
    error = "" if result else str(failed.get("error", ""))
    return Run(folder, state, config, result, error, str(mark), task, model, preset, policy, int(config["seed"]))


def read_result(folder: Path) -> dict[str, Any]:
    """Read ``result.json`` in the form of version 2, whichever version wrote it; empty where there is none."""
    path = folder / "result.json"
    return results.read_result(path) if path.exists() else {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a dictionary; an empty one where there is no file."""
    return _read(path, lambda: json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _read(path: Path, parse: Callable[[], Any]) -> dict[str, Any]:
    try:
        found = parse()
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"expected a file as chela writes it at {path}, could not read it ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"expected a dictionary in {path}, got a {type(found).__name__}")
    return found


def write(path: Path, data: str | bytes) -> None:
    """Write a file whole, and make its folder where there is none; UsageError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"expected a folder to write to, got {path.parent} ({error.strerror})") from None
    write_whole(path, data if isinstance(data, bytes) else data.encode())


def task_order(task: str) -> tuple[int, str]:
    """Return a task's sort key."""
    return (_ORDER.index(task) if task in _ORDER else len(_ORDER), task)


@dataclass
class Options:
    """What the command is told."""

    words: list[str] = option(
        ["status", "runs"], "status, list or collect, then run folders, or folders above them", positional=True
    )
    to: Path | None = option(None, "where collect writes its copies")


@cli.command(Options, __doc__)
def main(options: Options) -> int:
    """Tell of runs, list or collect them; return the exit status."""
    action, *paths = options.words
    if not paths or action not in (("status", "list") if options.to is None else ("collect",)):
        got = " ".join([*options.words, *([f"to={options.to}"] if options.to else [])])
        raise UsageError(f"expected status RUN…, list RUN… or collect RUN… to=FOLDER, got {got}; see --help")
    if action == "status":
        from experiments.status import status_lines

        sys.stdout.writelines(f"{line}\n" for line in status_lines(read_runs(paths), time.time()))
        return 0
    if options.to is not None:
        return _collect(paths, options.to)
    for run in read_runs(paths):
        told, space = "–", "" if run.score["unit"] in ("", "%") else " "
        if run.state == "finished":
            told = f"{run.value:.{run.score['digits']}f}{space}{run.score['unit']}"
            told += f" ({lra})" if (lra := results.of_arena(run.result)) else ""
        words = (f"{run.task}-{run.preset}", run.model, f"seed {run.seed}", run.state, told, str(run.path))
        sys.stdout.write("  ".join(words) + (f"  ({run.error})" if run.error else "") + "\n")
    return 0


def _collect(paths: list[str], to: Path) -> int:
    runs = read_runs(paths)
    for path in (*map(Path, paths), *(run.path for run in runs)):
        if path.resolve().is_relative_to(to.resolve()):  # a copy would overwrite what it is made from
            raise UsageError(f"to: expected a folder apart from the runs, got {to}, which holds {path}; name another")
    kept = [run for run in runs if run.state in ("finished", "failed")]
    for run in kept:
        name = f"{run.model}-seed{run.seed}-{run.fingerprint}"
        target = to / ("" if run.state == "finished" else "failed") / f"{run.task}-{run.preset}" / name
        config = OmegaConf.load(run.path / "config.yaml")
        for key, value in _LOCAL.items():
            OmegaConf.update(config, key, value)
        if run.config.get("data.released"):
            OmegaConf.update(config, "data.root", "released")  # not where it lay, but that it was no generated data
        if "data.text" in run.config:
            OmegaConf.update(config, "data.root", run.config["data.text"])  # which text it was
        write(target / "config.yaml", OmegaConf.to_yaml(config))
        for file in ("result.json", "metrics.csv", "failed.json", PROBE, LENGTH):
            if (run.path / file).is_file():
                shutil.copyfile(run.path / file, target / file)
    for rates in [file for path in paths for file in Path(path).glob("rates/*.yaml")]:
        write(to / "rates" / rates.name, rates.read_bytes())
    left = f"; {len(runs) - len(kept)} unfinished or untested left out" if len(kept) < len(runs) else ""
    sys.stdout.write(f"copied {len(kept)} runs to {to}{left}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
