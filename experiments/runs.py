"""Read runs: their folders and collected results alike; lightning is not imported.

chela runs collect runs/lra_mini into=experiments/results/lra_mini  results as three files

``collect`` writes what a table and its figures need: ``runs.jsonl``, a line for each finished or failed run with its
name and the content of its files, ``curves.csv``, the lines of each ``metrics.csv`` after the name of its run, and
``rates.yaml``, a sweep's choices of learning rates. Runs that are there already stay. It takes the folders of this
machine out of the configuration.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from chela import results
from chela.config.compose import flat, label
from chela.config.identity import identity_of
from chela.config.words import command
from chela.core.errors import UsageError
from chela.core.files import make_folder, write_whole
from chela.core.options import option
from chela.results import ACCURACY, COLUMN_GROUPS, TITLES

if TYPE_CHECKING:
    import pandas as pd

_ORDER = [task for group in COLUMN_GROUPS.values() for task in group]  # others follow these
RATE = "optimizer.lr"  # what a sweep tunes
TUNE = "tune"  # folder in which a sweep keeps the short runs that chose its learning rates: they are no results
RUNS, CURVES, RATES = "runs.jsonl", "curves.csv", "rates.yaml"  # collected results
FILES = {"result": "result.json", "failed": "failed.json", "probe": "probe.json", "length": "length.json"}
UNREADABLE = (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException)  # raised by a damaged file
_FINGERPRINT = re.compile(r"-([0-9a-f]{8})(?:-\d+)?$")
_RANK = ("unfinished", "failed", "untested", "finished")  # of two folders of one run the later state counts

Record = dict[str, Any]
"""A run's ``config`` (nested, as in config.yaml), and the content of each of ``FILES`` that it has."""


class Run:
    """A run, with its score as tables show it.

    Args:
        path: Its folder, or the one that it would have beside the collected results.
        record: What is told of it.
        curves: The lines of ``metrics.csv`` as they were written.
    """

    def __init__(self, path: Path, record: Record, curves: pd.DataFrame) -> None:
        self.path, self.record, self.curves = path, record, curves
        self.result = record.get("result", {})  # empty unless finished or untested (trainer.test=false)
        # by dotted key, without what does not change numbers
        self.config = identity_of(flat(record.get("config", {})), neutral=True)
        if missing := sorted({"task.name", "model.name", "preset", "data.validation", "seed"} - set(self.config)):
            raise UsageError(f"expected a run's config.yaml in {path}, it lacks {', '.join(missing)}")
        if "own_code" in self.result:  # edited code makes another row
            self.config["own_code"] = ",".join(self.result["own_code"].values())
        ended = "finished" if self.result.get("test") else "untested" if self.result else "unfinished"
        self.state = "failed" if "failed" in record and not self.result else ended
        named = _FINGERPRINT.findall(path.name) or [path]
        outcome = self.result or record.get("failed", {})
        self.fingerprint = str(outcome.get("fingerprint") or named[0])  # equal for runs that must give equal numbers
        self.task = label(str(self.config["task.name"]))
        self.title = str(self.result.get("task_title") or TITLES.get(self.task, self.task))
        self.model = label(str(self.config["model.name"]))
        self.preset = str(self.config["preset"])
        self.policy = str(self.config["data.validation"])  # what it was validated on: "holdout" or "test"
        self.edition = int(self.config.get("edition", 1))  # of the mini tasks
        self.seed = int(self.config["seed"])
        self.score = self.result.get("score", ACCURACY)  # name, unit, scale, digits and the better direction

    @property
    def value(self) -> float:
        """Return a finished run's score on the test set, in the score's unit."""
        return float(self.score["scale"] * self.result["test"][self.score["name"]])

    @property
    def cell(self) -> tuple[tuple[str, str], ...]:
        """Return what is equal for runs that differ by their seed alone."""
        return tuple((key, str(value)) for key, value in self.config.items() if key != "seed")

    def metrics(self, split: str) -> pd.DataFrame:
        """Return the lines of ``metrics.csv`` for "train" or "validation"; empty where there are none."""
        own = self.curves.loc[:, (self.curves != "").any()] if len(self.curves) else self.curves  # not of other runs
        lines = own[own["split"] == split].drop(columns=["run", "split"], errors="ignore")
        return lines.replace("", "nan").astype(float).reset_index(drop=True)


def read_runs(paths: Iterable[Path | str]) -> list[Run]:
    """Read every run in and below the folders, each once: the finished one where a run was begun twice.

    Folders called ``tune`` are left out unless they are asked for by name. UsageError where one holds no run.
    """
    read: list[Run] = []
    for top in map(Path, paths):
        collected = sorted(top.rglob(RUNS))
        found = [run for file in collected for run in _collected(file)] + [*map(read_run, _run_folders(top))]
        if not found:
            held = "it holds none (a run has a config.yaml)" if top.is_dir() else "there is no such folder"
            raise UsageError(f"expected runs in {top}, {held}")
        read += found
    kept = {run.fingerprint: run for run in sorted(read, key=lambda run: _RANK.index(run.state))}
    return sorted(kept.values(), key=lambda run: (run.preset, task_order(run.task), run.model, run.cell, run.seed))


def _run_folders(top: Path) -> list[Path]:
    """Return the folders of runs; a config.yaml below one, such as wandb's, is none."""
    folders = {path.parent for path in top.rglob("config.yaml")}
    outermost = {folder for folder in folders if folders.isdisjoint(folder.parents)}
    return sorted(folder for folder in outermost if TUNE not in folder.relative_to(top).parts)


def read_run(folder: Path) -> Run:
    """Read a run's folder."""
    record = {"config": read_file(folder / "config.yaml")}
    record |= {key: found for key, name in FILES.items() if (found := read_file(folder / name))}
    if "result" in record:
        record["result"] = results.read_result(folder / FILES["result"])
        record.pop("failed", None)  # before
    return Run(folder, record, _read_curves(folder / "metrics.csv"))


def _collected(file: Path) -> list[Run]:
    curves = _read_curves(file.with_name(CURVES))
    by_run = dict(iter(curves.groupby("run")))
    records = read_records(file).items()
    return [Run(file.parent / name, record, by_run.get(name, curves[:0])) for name, record in records]


def read_records(file: Path) -> dict[str, Record]:
    """Read ``runs.jsonl``: the record of each run, by its name; empty where there is no file."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    try:
        return {record["run"]: record for record in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"expected runs, a line each, in {file}, could not read it ({error!r})") from None


def _read_curves(file: Path) -> pd.DataFrame:
    """Read metrics as they were written."""
    import pandas as pd

    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    whole = io.StringIO(text[: text.rfind("\n") + 1] or "run,split\n")  # the last line may be torn
    return pd.read_csv(whole, dtype=str, keep_default_na=False)


def result_in(folder: Path) -> dict[str, Any]:
    """Return the result of the run in a folder, or of the collected run that goes by it; empty where there is none."""
    path, top = folder / FILES["result"], folder.parents[1]
    if path.exists():
        return results.read_result(path)
    return dict(read_records(top / RUNS).get(str(folder.relative_to(top)), {}).get("result", {}))


def read_file(path: Path) -> dict[str, Any]:
    """Read a dictionary, JSON or YAML by the file's ending; an empty one where there is no file."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else "{}"
        found: Any = json.loads(text) if path.suffix == ".json" else OmegaConf.to_container(OmegaConf.create(text))
    except UNREADABLE as error:
        raise UsageError(f"expected a file as chela writes it at {path}, could not read it ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"expected a dictionary in {path}, got a {type(found).__name__}")
    return found


def add_rates(folder: Path, new: dict[str, Any]) -> dict[str, Any]:
    """Write further records beside those that are there; return them all."""
    records = read_file(folder / RATES) | new
    if new:
        write(folder / RATES, OmegaConf.to_yaml(OmegaConf.create(records)))
    return records


def write(path: Path, data: str | bytes) -> None:
    """Write a file whole, and make its folder where there is none; UsageError where that cannot be."""
    make_folder(path.parent, str(path))
    write_whole(path, data if isinstance(data, bytes) else data.encode())


def task_order(task: str) -> tuple[int, str]:
    """Return a task's sort key."""
    return (_ORDER.index(task) if task in _ORDER else len(_ORDER), task)


@dataclass
class Options:
    """What the command is told."""

    words: list[str] = option(MISSING, "collect, then run folders, or folders above them", positional=True)
    into: Path = option(MISSING, "the folder that they are collected into")


@command(Options, __doc__)
def main(options: Options) -> int:
    """Write the finished and failed runs, their curves and a sweep's rates as three files; return the exit status."""
    import pandas as pd

    into, (action, *paths) = options.into, options.words
    if action != "collect" or not paths:
        raise UsageError(f"expected collect RUN… into=FOLDER, got {' '.join(options.words)} into=…; see --help")
    runs = read_runs(paths)
    kept = [run for run in runs if run.state in ("finished", "failed")]
    records, curves = {}, {}
    for run in [*_collected(into / RUNS), *kept]:  # one that comes again replaces its line
        name = f"{run.task}-{run.preset}/{run.model}-seed{run.seed}-{run.fingerprint}"
        # instead of this machine's folder: released data or not, and the name of a text
        root = run.config.get("data.text", "released" if run.config.get("data.released") else None)
        config = run.record["config"]
        config = {**config, "runs": "runs", "resume": "none", "data": {**config["data"], "dir": "", "root": root}}
        records[name] = {"run": name} | run.record | {"run": name, "config": config}
        if len(run.curves):
            curves[name] = run.curves.assign(run=name)
    lines = [json.dumps(records[name], ensure_ascii=False) for name in sorted(records)]
    write(into / RUNS, "".join(f"{line}\n" for line in lines))
    if curves:
        columns = dict.fromkeys(["run", *(column for lines in curves.values() for column in lines)])
        whole = pd.concat([curves[name] for name in sorted(curves)])
        write(into / CURVES, whole.to_csv(columns=list(columns), index=False, lineterminator="\n"))
    add_rates(into, {name: rate for path in paths for name, rate in read_file(Path(path) / RATES).items()})
    left = f"; {len(runs) - len(kept)} unfinished or untested left out" if len(kept) < len(runs) else ""
    print(f"collected {len(kept)} runs into {into}{left}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
