"""Run a grid of task × model × seed; finished runs are skipped, begun ones go on, a failed one stops nobody.

python -m experiments.sweep configs/sweep/lra_mini.yaml --dry-run          what is done, what there is to do
python -m experiments.sweep configs/sweep/lra_mini.yaml                    as many at once as there are cores or GPUs
python -m experiments.sweep configs/sweep/lra_mini.yaml task=image seed=0  a part of the grid
python -m experiments.sweep configs/sweep/lra.yaml launcher=slurm          as job arrays

Words: task=, model=, seed= (several with commas) narrow the grid; preset=, runs=FOLDER (runs/NAME), jobs=N (most runs
at once) and launcher=local|slurm; any other key=value goes to every run, such as trainer.max_time=1h for a slice of
each. Start it again after whatever ended it: it goes on. See docs/sweeps.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from chela.cli import guarded
from chela.config import to_yaml
from chela.errors import DivergedError, UsageError
from experiments.board import Board
from experiments.launchers import TRAIN, Ended, Launcher, Local
from experiments.plan import Job, Pair, Plan, read_plan
from experiments.runs import read_run

GRID = ("task", "model", "seed", "preset")
LAUNCHERS = ("local", "slurm")
ATTEMPTS = 3  # of a run that is killed, in one launch of the sweep
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # the run was asked to stop, and saved


class Sweep:
    """Starts what is ready, watches what runs, and chooses a pair's learning rate once its grid is complete.

    Args:
        pairs: The work, in order.
        folder: The sweep's folder: runs, ``rates/``, ``failed/``, ``logs/``, ``locks/``.
        launcher: Where runs are started.
        board: Shows how it goes.
        poll_seconds: Time between two looks.
    """

    def __init__(
        self, pairs: Sequence[Pair], folder: Path, launcher: Launcher, board: Board, poll_seconds: float = 0.5
    ) -> None:
        self.folder, self.launcher, self.board, self.poll_seconds = folder, launcher, board, poll_seconds
        self.undecided = list(pairs)
        self.waiting: deque[Job] = deque()
        self.attempts: dict[str, int] = {}
        self.failed: dict[str, Ended] = {}
        self.begun: dict[str, Job] = {}
        self.diverged: set[str] = set()  # runs of a grid: an answer, no failure
        self.blocked: dict[str, str] = {}
        self._known: set[str] = set()
        self._news = True  # something has ended since the pairs were last looked at
        self._asked: int | None = None

    def run(self) -> int:
        """Work until nothing is left to do; return the exit status."""
        handlers = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self.board:
                while self._asked is None and self._turn():
                    time.sleep(self.poll_seconds)
                if self._asked is not None:
                    self.board.say(f"asked to stop: {self.launcher.stopping}")
                    for ended in self.launcher.stop():
                        self._settle(ended)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self._asked is not None:
            return 128 + self._asked
        return 1 if self.failed or self.blocked else 0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = number

    def _turn(self) -> bool:
        """Look once at everything; return whether there is anything left to wait for."""
        for ended in self.launcher.poll():
            self._settle(ended)
        if self._news:
            self._news = False
            self._decide()
        self._start()
        self.board.show(self.launcher.running(), len(self.waiting), len(self.undecided))
        return bool(self._news or self.waiting or self.launcher.running())

    def _decide(self) -> None:
        """Queue the grids of rates, and the seeds of the pairs whose rate is known."""
        still = []
        for pair in self.undecided:
            if not pair.tune:
                self._queue(pair.runs(None))
                continue
            rate = recorded_rate(self.folder, pair)
            if rate is None:
                self._queue(pair.tune)
                rate = self._choose(pair)
            if rate is None:
                still.append(pair)
            else:
                self._queue(pair.runs(rate), first=True)
        self.undecided = [pair for pair in still if pair.name not in self.blocked]

    def _choose(self, pair: Pair) -> float | None:
        """Choose the rate when each run of the grid is finished or has diverged; note a grid that cannot be."""
        open_ = [job for job in pair.tune if job.name not in self.diverged and not job.finished()]
        if not open_:
            if all(job.name in self.diverged for job in pair.tune):
                self._block(pair, "training diverged at every learning rate of the grid")
                return None
            rate = choose_rate(self.folder, pair)
            self.board.say(f"{pair.name}: learning rate {rate} chosen on validation")
            return rate
        ended = [job.name for job in open_ if job.name in self.failed or job.name in self.begun]
        if len(ended) == len(open_):
            self._block(pair, f"no learning rate yet, as {', '.join(ended)} did not finish")
        return None

    def _block(self, pair: Pair, reason: str) -> None:
        self.blocked[pair.name] = reason
        self.board.blocked(pair.name, reason)

    def _queue(self, jobs: Iterable[Job], first: bool = False) -> None:
        new = [job for job in jobs if job.name not in self._known]
        self._known.update(job.name for job in new)
        finished = [job for job in new if job.finished()]
        for job in finished:
            clear_failure(job)
        self.board.known(new, finished)
        todo = [job for job in new if job not in finished]
        if first:
            self.waiting.extendleft(reversed(todo))
        else:
            self.waiting.extend(todo)

    def _start(self) -> None:
        room = min(self.launcher.room(), len(self.waiting))
        batch = [self.waiting.popleft() for _ in range(max(0, room))]
        ready = []
        for job in batch:
            if job.finished():  # by another launcher, while it waited here
                self.board.finished(job)
                self._news = True
            else:
                ready.append(job)
        elsewhere = self.launcher.start(ready) if ready else []
        self.waiting.extend(elsewhere)
        self.board.started([job for job in ready if job not in elsewhere])

    def _settle(self, ended: Ended) -> None:
        self._news = True
        job = ended.job
        if job.finished():
            clear_failure(job)
            self.board.finished(job)
        elif ended.status == 0 or ended.status in STOPPED or self._asked is not None:
            self.begun[job.name] = job
            self.board.stopped(job)
        elif ended.status is not None and ended.status < 0 and self.attempts.get(job.name, 1) < ATTEMPTS:
            self.attempts[job.name] = self.attempts.get(job.name, 1) + 1
            self.board.say(f"{job.name}: killed by signal {-ended.status}, goes on from its last checkpoint")
            self.waiting.append(job)
        elif job.tunes and ended.status == DivergedError.status:
            self.diverged.add(job.name)
            self.board.finished(job, f"diverged: {ended.last_line}")
        else:
            self.failed[job.name] = ended
            record_failure(ended)
            self.board.failed(job, ended.last_line or f"exit status {ended.status}")


# ---- what the sweep writes down --------------------------------------------------------------------------------------


def recorded_rate(folder: Path, pair: Pair) -> float | None:
    """Return the rate that was chosen for a pair from this very grid; None when none was.

    A record that cannot be read is none, so that the rate is chosen anew.
    """
    path = folder / "rates" / f"{pair.name}.yaml"
    if not path.is_file():
        return None
    try:
        record: Any = OmegaConf.to_container(OmegaConf.load(path))
        same = [row["fingerprint"] for row in record["grid"]] == [job.fingerprint for job in pair.tune]
        return float(record["chosen"]) if same else None
    except (OSError, KeyError, TypeError, ValueError, YAMLError, OmegaConfBaseException):
        return None


def choose_rate(folder: Path, pair: Pair) -> float:
    """Take the rate with the best validation accuracy, the first of the grid among equals, and write it down."""
    grid, best = [], (-1.0, 0.0)
    for job in pair.tune:
        row: dict[str, Any] = {"rate": job.config.optimizer.lr, "fingerprint": job.fingerprint}
        run = job.run_folder()
        if run is not None and job.finished():
            row["validation_accuracy"] = float(read_run(run).result["best_validation_accuracy"])
            if row["validation_accuracy"] > best[0]:
                best = (row["validation_accuracy"], row["rate"])
        else:
            row["diverged"] = True
        grid.append(row)
    config = pair.tune[0].config
    record = {"chosen": best[1], "seed": config.seed, "steps": config.trainer.max_steps, "grid": grid}
    _write(folder / "rates" / f"{pair.name}.yaml", OmegaConf.to_yaml(OmegaConf.create(record)))
    return best[1]


def _failure_folder(job: Job) -> Path:
    return job.folder.parent.parent / "failed" / job.folder.parent.name / job.folder.name


def record_failure(ended: Ended) -> None:
    """Write down a run that failed, so that the table can count it."""
    folder = _failure_folder(ended.job)
    text = {"fingerprint": ended.job.fingerprint, "status": ended.status, "error": ended.last_line}
    _write(folder / "config.yaml", to_yaml(ended.job.config))
    _write(folder / "failed.json", json.dumps(text, indent=2) + "\n")


def clear_failure(job: Job) -> None:
    """Forget a failure once the run is finished."""
    folder = _failure_folder(job)
    for name in ("failed.json", "config.yaml"):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir():
        folder.rmdir()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None, command: Sequence[str] = TRAIN) -> int:
    """Run a sweep; ``command`` is what is called with each run's words."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a sweep file, such as configs/sweep/lra_mini.yaml")
    parser.add_argument("words", nargs="*", metavar="key=value", help="see above")
    parser.add_argument("--dry-run", action="store_true", help="say what there is to do, and stop")
    parser.add_argument("--shard", default="1/1", metavar="i/n", help="do the i-th of n parts of the work")
    asked = parser.parse_intermixed_args(argv)
    return guarded(lambda: sweep(asked.file, asked.words, asked.shard, asked.dry_run, command))


def sweep(path: Path, words: list[str], shard: str, dry_run: bool, command: Sequence[str]) -> int:
    """Read the file, then do the work or say what there is."""
    own = {"launcher": "local", "jobs": "0", "runs": f"runs/{path.stem}"}
    chosen: dict[str, str] = {}
    rest = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"expected key=value, got {word[:80]!r}; see --help")
        if key in own or key in GRID:
            (own if key in own else chosen)[key] = value
        else:
            rest.append(word)
    if own["launcher"] not in LAUNCHERS:
        raise UsageError(f"launcher: expected one of {', '.join(LAUNCHERS)}, got {own['launcher']!r}")
    if not own["jobs"].isdecimal():
        raise UsageError(f"jobs: expected a number, 0 for as many as fit, got {own['jobs']!r}")
    folder = Path(own["runs"])
    plan = read_plan(path, folder, chosen, rest)
    pairs = sharded(list(plan.pairs()), shard)
    board = Board(folder)
    if dry_run:
        return _dry_run(pairs, folder, board)
    jobs = int(own["jobs"]) or plan.file.jobs
    example = next((job for pair in pairs for job in (*pair.tune, *pair.runs(None))), None)
    if example is None:
        raise UsageError("expected at least one run, this part of the grid has none")
    launcher = _launcher(own["launcher"], plan, jobs, example, command)
    status = Sweep(pairs, folder, launcher, board).run()
    board.summary()
    return status


def _launcher(name: str, plan: Plan, jobs: int, example: Job, command: Sequence[str]) -> Launcher:
    if name == "local":
        return Local(plan.folder, jobs, plan.file.threads, example, command)
    from experiments.slurm import Slurm

    return Slurm(plan.folder, jobs, plan.file.threads, example, plan.file.slurm, command)


def sharded(pairs: list[Pair], shard: str) -> list[Pair]:
    """Return the i-th of n parts: whole pairs where a rate is shared, else single runs."""
    first, slash, last = shard.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UsageError(f"--shard: expected i/n with i from 1 to n, got {shard!r}")
    index, parts = int(first) - 1, int(last)
    if any(pair.tune for pair in pairs):
        return pairs[index::parts]
    mine, counted = [], 0
    for pair in pairs:
        seeds = tuple(seed for place, seed in enumerate(pair.seeds, counted) if place % parts == index)
        counted += len(pair.seeds)
        if seeds:
            mine.append(replace(pair, seeds=seeds))
    return mine


def _dry_run(pairs: list[Pair], folder: Path, board: Board) -> int:
    for pair in pairs:
        rate = recorded_rate(folder, pair) if pair.tune else None
        undecided = bool(pair.tune) and rate is None
        for job in pair.tune if undecided else pair.runs(rate):
            board.plain(f"{job_state(job):<9} python -m chela.train {' '.join(job.words)}")
        if undecided:
            board.plain(f"{'then':<9} seeds {', '.join(map(str, pair.seeds))} of {pair.name} with the best rate")
    return 0


def job_state(job: Job) -> str:
    """Return "finished", "begun" or "new"."""
    if job.finished():
        return "finished"
    return "begun" if job.run_folder() else "new"


if __name__ == "__main__":
    sys.exit(main())
