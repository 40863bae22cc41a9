"""Read runs: their folders and collected results alike; lightning is not imported.

chela runs collect runs/lra_mini into=experiments/results/lra_mini  results as three files

``collect`` writes what a table and its figures need: ``runs.jsonl``, a line for each finished or failed run with its
name and the content of its files, ``curves.csv``, the lines of each ``metrics.csv`` after the name of its run, and
``rates.yaml``, a sweep's choices of learning rates. Runs that are there already stay. It takes the folders of this
machine out of the configuration. A collected run goes by the path that its folder would have there.
"""

from __future__ import annotations

import functools
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from chela import results
from chela.config.compose import from_saved
from chela.config.groups import flat, label
from chela.config.identity import identity_of
from chela.config.words import command
from chela.core.errors import UsageError
from chela.core.files import make_folder, write_whole
from chela.core.options import option
from chela.results import ACCURACY, GROUPS, TITLES

if TYPE_CHECKING:
    import pandas as pd

    from chela.config.schema import Config

TASKS = tuple(TITLES)  # of the Long Range Arena in the order of its tables
_ORDER = [task for group in GROUPS.values() for task in group]  # others follow these
RATE = "optimizer.lr"  # what a sweep tunes
TUNE = "tune"  # folder in which a sweep keeps the short runs that chose its learning rates: they are no results
RUNS, CURVES, RATES = "runs.jsonl", "curves.csv", "rates.yaml"  # collected results
FILES = {"result": "result.json", "failed": "failed.json", "probe": "probe.json", "length": "length.json"}
UNREADABLE = (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException)  # what a damaged file raises
_FINGERPRINT = re.compile(r"-([0-9a-f]{8})(?:-\d+)?$")
_RANK = ("unfinished", "failed", "untested", "finished")  # of two folders of one run the later state counts

Record = dict[str, Any]
"""What is told of a run: its ``config`` (nested, as in config.yaml), and of ``FILES`` the content of those it has."""


@dataclass(frozen=True)
class Run:
    """A run, with its score as tables show it."""

    path: Path  # its folder, or the one that it would have beside the collected results
    curves: Path  # its own metrics.csv, or that of all collected runs
    name: str  # in the latter; else empty
    record: Record = field(repr=False)
    config: dict[str, Any] = field(repr=False)  # by dotted key, without what does not change numbers
    result: dict[str, Any] = field(repr=False)  # ``result.json``; empty unless finished or untested
    state: str  # "finished", "untested" (trainer.test=false), "failed" (a sweep wrote down how) or "unfinished"
    fingerprint: str  # equal for runs that must give equal numbers; the folder's path where none was written down
    task: str  # of "my_module:MyTask" what follows the colon
    title: str  # of the task in tables
    model: str
    preset: str
    policy: str  # what it was validated on: "holdout" or "test"
    edition: int  # of the mini tasks
    seed: int
    score: dict[str, Any]  # of the task: name, unit, scale, digits and the better direction ("max" or "min")

    @property
    def value(self) -> float:
        """Return a finished run's score on the test set, in the score's unit."""
        return float(self.score["scale"] * self.result["test"][self.score["name"]])

    @property
    def cell(self) -> tuple[tuple[str, str], ...]:
        """Return what is equal for runs that differ by their seed alone."""
        return tuple((key, str(value)) for key, value in self.config.items() if key != "seed")

    def load_config(self) -> Config:
        """Return its configuration as one of today's; UsageError where it is none."""
        return from_saved(self.record["config"], self.path)

    def metrics(self, split: str) -> pd.DataFrame:
        """Return the lines of ``metrics.csv`` for "train" or "validation"; empty where there are none."""
        import pandas as pd

        lines = _read_curves(self.curves).get(self.name)
        if lines is None:
            return pd.DataFrame()
        if self.name:
            lines = lines.loc[:, (lines != "").any()]  # without the columns of other runs
        try:
            lines = lines[lines["split"] == split].drop(columns="split").replace("", "nan")
            return lines.astype(float).reset_index(drop=True)
        except (KeyError, ValueError) as error:
            raise UsageError(f"expected the metrics of a run at {self.curves}, got {error}") from None


def read_runs(paths: Iterable[Path | str]) -> list[Run]:
    """Read every run in and below the folders, each once: the finished one where a run was begun twice.

    Folders called ``tune`` are left out unless they are asked for by name. UsageError where one holds no run.
    """
    kept: dict[str, Run] = {}
    for top in map(Path, paths):
        if not (found := [*_collected_runs(top), *map(read_run, _run_folders(top))]):
            what = f"expected runs in {top}, it holds none (a run has a config.yaml)"
            raise UsageError(what if top.is_dir() else f"expected the folder of runs, there is none at {top}")
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
    """Read a run's folder."""
    path = folder / "config.yaml"
    record = {"config": _read(path, lambda: OmegaConf.to_container(OmegaConf.load(path)))}
    record |= {key: found for key, name in FILES.items() if (found := read_json(folder / name))}
    if "result" in record:
        record["result"] = results.read_result(folder / FILES["result"])
    return _run(folder, record, folder / "metrics.csv")


def _collected_runs(top: Path) -> Iterator[Run]:
    """Read the collected runs at or below a path, which need not be there: their names alone say where they lie."""
    above = [folder / RUNS for folder in (top, *top.parents) if (folder / RUNS).is_file()]
    for file in [*above[:1], *sorted(set(top.rglob(RUNS)) - set(above))]:
        for name, record in read_records(file).items():
            if (path := file.parent / name).is_relative_to(top):
                yield _run(path, record, file.with_name(CURVES), name)


def read_records(file: Path) -> dict[str, Record]:
    """Read ``runs.jsonl``: what is told of each run, by its name; nothing where there is no file."""
    return _read_records(file, file.stat().st_mtime_ns) if file.is_file() else {}


@functools.lru_cache(maxsize=32)
def _read_records(file: Path, changed: int) -> dict[str, Record]:
    lines = file.read_text(encoding="utf-8").splitlines()
    records = [_read(file, functools.partial(json.loads, line)) for line in lines]
    if not all({"run", "config"} <= record.keys() for record in records):
        raise UsageError(f"expected lines with run and config in {file}, one has not")
    return {record["run"]: record for record in records}


def _read_curves(file: Path) -> dict[str, pd.DataFrame]:
    """Read metrics as they were written, by the name of the run; a run's own go by an empty name."""
    return _read_texts(file, file.stat().st_mtime_ns) if file.is_file() else {}


@functools.lru_cache(maxsize=32)
def _read_texts(file: Path, changed: int) -> dict[str, pd.DataFrame]:
    import pandas as pd

    text = file.read_text(encoding="utf-8")
    whole = io.StringIO(text[: text.rfind("\n") + 1] or "split\n")  # the last line may be torn
    frame = pd.read_csv(whole, dtype=str, keep_default_na=False)
    if "run" not in frame:
        return {"": frame}
    return {name: lines.drop(columns="run") for name, lines in frame.groupby("run", sort=False)}


def _run(path: Path, record: Record, curves: Path, name: str = "") -> Run:
    result, failed = record.get("result", {}), record.get("failed", {})
    options = identity_of(flat(record["config"]), neutral=True)
    if "own_code" in result:  # edited code is another row
        options["own_code"] = ",".join(result["own_code"].values())
    if missing := sorted({"task.name", "model.name", "preset", "data.validation", "seed"} - set(options)):
        raise UsageError(f"expected a run's config.yaml in {path}, it lacks {', '.join(missing)}")
    state = "finished" if result.get("test") else "untested" if result else "failed" if failed else "unfinished"
    in_name = _FINGERPRINT.search(path.name)
    task = label(str(options["task.name"]))
    return Run(
        path, curves, name, record, options, result, state,
        fingerprint=str((result or failed).get("fingerprint") or (in_name[1] if in_name else path)),
        task=task,
        title=str(result.get("task_title") or TITLES.get(task, task)),
        model=label(str(options["model.name"])),
        preset=str(options["preset"]),
        policy=str(options["data.validation"]),
        edition=int(options.get("edition", 1)),
        seed=int(options["seed"]),
        score=result.get("score", ACCURACY),
    )  # fmt: skip


def read_result(folder: Path) -> dict[str, Any]:
    """Return the result of the run in a folder, or of the collected run that goes by it; empty where there is none."""
    path = folder / FILES["result"]
    if path.exists():
        return results.read_result(path)
    known = (read_records(above / RUNS).get(str(folder.relative_to(above)), {}) for above in folder.parents)
    return next((record["result"] for record in known if "result" in record), {})


def read_json(path: Path) -> dict[str, Any]:
    """Read a dictionary; an empty one where there is no file."""
    return _read(path, lambda: json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _read(path: Path, parse: Callable[[], Any]) -> dict[str, Any]:
    try:
        found = parse()
    except UNREADABLE as error:
        raise UsageError(f"expected a file as chela writes it at {path}, could not read it ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"expected a dictionary in {path}, got a {type(found).__name__}")
    return found


def read_rates(folder: Path) -> dict[str, Any]:
    """Read the learning rates that a sweep chose, a record by task and system; nothing where they cannot be read."""
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(folder / RATES))
        return {name: record for name, record in dict(found).items() if isinstance(record, dict)}
    except UNREADABLE:
        return {}


def add_rates(folder: Path, new: dict[str, Any]) -> dict[str, Any]:
    """Write further records beside those that are there; return them all."""
    records = read_rates(folder) | new
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
    """Collect runs; return the exit status."""
    action, *paths = options.words
    if action != "collect" or not paths:
        raise UsageError(f"expected collect RUN… into=FOLDER, got {' '.join(options.words)} into=…; see --help")
    print(collect(paths, options.into))
    return 0


def collect(paths: list[str], into: Path) -> str:
    """Write the finished and failed runs, their curves and a sweep's rates as three files; say what was done."""
    import pandas as pd

    runs = read_runs(paths)
    kept = [run for run in runs if run.state in ("finished", "failed")]
    records, curves = dict(read_records(into / RUNS)), dict(_read_curves(into / CURVES))
    for run in kept:
        name = f"{run.task}-{run.preset}/{run.model}-seed{run.seed}-{run.fingerprint}"
        # of the machine's folders stays that data was no generated one, and which text it was
        root = run.config.get("data.text", "released" if run.config.get("data.released") else None)
        told = run.record["config"]
        told = {**told, "runs": "runs", "resume": "none", "data": {**told["data"], "dir": "", "root": root}}
        records[name] = {"run": name} | run.record | {"run": name, "config": told}
        if (lines := _read_curves(run.curves).get(run.name)) is not None:
            curves[name] = lines
    lines = [json.dumps(records[name], ensure_ascii=False) for name in sorted(records)]
    write(into / RUNS, "".join(f"{line}\n" for line in lines))
    if curves:
        by_width = sorted(curves.values(), key=lambda lines: -len(lines.columns))
        columns = dict.fromkeys(column for lines in by_width for column in lines)
        whole = pd.concat([curves[name].assign(run=name) for name in sorted(curves)])
        write(into / CURVES, whole.to_csv(columns=["run", *columns], index=False, lineterminator="\n"))
    add_rates(into, {name: rate for path in paths for name, rate in read_rates(Path(path)).items()})
    left = f"; {len(runs) - len(kept)} unfinished or untested left out" if len(kept) < len(runs) else ""
    return f"collected {len(kept)} runs into {into}{left}"


if __name__ == "__main__":
    sys.exit(main())
