"""Run a grid of task × model × seed; finished runs are skipped, begun ones go on, a failed one stops nobody.

chela sweep configs/sweep/lra_mini.yaml dry_run=true       what is done, what there is to do
chela sweep configs/sweep/lra_mini.yaml                    as many at once as there are cores or GPUs
chela sweep configs/sweep/lra_mini.yaml task=image seed=0  a part of the grid
chela sweep configs/sweep/lra.yaml launcher=slurm          as job arrays

Any key=value that is not listed below goes to every run, such as trainer.max_time=1h for a slice of each. Start it
again after whatever ended it: it goes on. See docs/sweeps.md.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from chela.config.words import command
from chela.core.errors import DivergedError, UsageError
from chela.core.options import option
from experiments.launchers import TRAIN, Ended, Local, Slurm
from experiments.plan import Job, Pair, read_sweep

ATTEMPTS = 3  # of a run that is killed, in one launch of the sweep
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # the run was asked to stop, and saved
PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False, "emoji": False}
MOST_BARS = 24  # of runs shown at once


@dataclass
class Sweep:
    """Starts what is ready, watches what runs, and chooses a pair's learning rate once its grid is complete.

    Each event is a line; a terminal also shows how far each run is.
    """

    undecided: list[Pair]  # the work, in order
    folder: Path  # runs, rates/, failed/, logs/, locks/
    launcher: Local | Slurm
    console: Console = field(default_factory=lambda: Console(file=sys.stdout, **PLAIN))
    poll_seconds: float = 0.5  # between two looks

    def __post_init__(self) -> None:
        """Begin with nothing known."""
        self.waiting: deque[Job] = deque()
        self.known: set[Job] = set()
        self.before = self.done = 0  # runs that were finished before, and in all
        self.kills: Counter[Job] = Counter()
        self.begun: set[Job] = set()
        self.diverged: set[Job] = set()  # runs of a grid: an answer, no failure
        self.failed: dict[str, str] = {}  # by the run's name: its last line
        self.blocked: dict[str, str] = {}  # by the pair's name: why its seeds cannot be run
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self.console, speed_estimate_period=1e6)
        self._progress.disable = not self.console.is_terminal
        self._bars: dict[Job | None, TaskID] = {}  # None: of the whole sweep
        self._news = True  # something has ended since the pairs were last looked at
        self._asked: int | None = None

    def run(self) -> int:
        """Work until nothing is left to do, and say how it ended; return the exit status."""
        handlers = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self._asked is None and self._turn():
                time.sleep(self.poll_seconds)
            if self._asked is not None:
                self.say("asked to stop", self.launcher.stopping)
                for ended in self.launcher.stop():
                    self._settle(ended)
        finally:
            self._progress.stop()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self._summary()
        return 128 + self._asked if self._asked is not None else 1 if self.failed or self.blocked else 0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = number

    def say(self, name: str, line: str) -> None:
        """Print what happened to a run, a pair or the sweep, with the time of day."""
        self.console.print(f"{time.strftime('%H:%M:%S')}  {name}: {line}")

    def _turn(self) -> bool:
        """Look once at everything; return whether there is anything left to wait for."""
        for ended in self.launcher.poll():
            self._settle(ended)
        if self._news:
            self._news = False
            self._decide()
        self._start()
        if not self._progress.disable:
            self.show()
        return bool(self._news or self.waiting or self.launcher.handles)

    def _decide(self) -> None:
        """Queue the grids of rates, and the seeds of the pairs whose rate is known."""
        undecided, self.undecided = self.undecided, []
        for pair in undecided:
            rate = pair.recorded_rate()
            if pair.tune and rate is None:
                self._queue(pair.tune)
                rate = self._choose(pair)
            if rate is not None or not pair.tune:
                self._queue(pair.runs(rate), first=bool(pair.tune))
            elif pair.name not in self.blocked:
                self.undecided.append(pair)

    def _choose(self, pair: Pair) -> float | None:
        """Choose the rate when each run of the grid is finished or has diverged; note a grid that cannot be."""
        unfinished = [job for job in pair.tune if job not in self.diverged and not job.finished()]
        ended = [job.name for job in unfinished if job.name in self.failed or job in self.begun]
        if not unfinished and not self.diverged.issuperset(pair.tune):
            rate = pair.choose_rate()
            self.say(pair.name, f"learning rate {rate} chosen on validation")
            return rate
        if len(ended) == len(unfinished):
            reason = f"no learning rate yet, as {', '.join(ended)} did not finish"
            self.blocked[pair.name] = reason if ended else "training diverged at every learning rate of the grid"
            self.say(pair.name, self.blocked[pair.name])
        return None

    def _queue(self, jobs: Iterable[Job], first: bool = False) -> None:
        """Add the runs that are not finished, before all others where a rate was chosen for them."""
        new = [job for job in jobs if job not in self.known]
        self.known.update(new)
        todo = [job for job in new if not job.finished()]
        for job in set(new).difference(todo):
            job.clear_failure()
        self.before += len(new) - len(todo)
        self.done += len(new) - len(todo)
        self.waiting = deque([*todo, *self.waiting] if first else [*self.waiting, *todo])

    def _start(self) -> None:
        ready = []
        for _ in range(min(self.launcher.room(), len(self.waiting))):
            job = self.waiting.popleft()
            if job.finished():  # by another launcher, while it waited here
                self._finish(job)
            else:
                ready.append(job)
        elsewhere = self.launcher.start(ready) if ready else []
        self.waiting.extend(elsewhere)
        for job in ready:
            if job not in elsewhere:
                step = job.step()
                self.say(job.name, f"goes on from step {step}" if step else "started")

    def _finish(self, job: Job, how: str = "finished") -> None:
        self._news = True
        self.done += 1
        self.say(job.name, f"{how} ({self.done}/{len(self.known)})")

    def _settle(self, ended: Ended) -> None:
        self._news = True
        job, status, line = ended
        if job.finished():
            job.clear_failure()
            self._finish(job)
        elif status == 0 or status in STOPPED or self._asked is not None:
            self.begun.add(job)
            self.say(job.name, f"stopped at step {job.step()} of {job.config.trainer.max_steps}")
        elif status is not None and status < 0 and self.kills[job] < ATTEMPTS - 1:
            self.kills[job] += 1
            self.say(job.name, f"killed by signal {-status}, goes on from its last checkpoint")
            self.waiting.append(job)
        elif job.tunes and status == DivergedError.status:
            self.diverged.add(job)
            self._finish(job, f"diverged: {line}")
        else:
            job.record_failure(status, line)
            self.failed[job.name] = line or f"exit status {status}"
            self.say(job.name, f"FAILED, the others go on: {self.failed[job.name]}")

    def show(self) -> None:
        """Draw how far the sweep and its runs are."""
        running = list(self.launcher.handles)
        whole = f"{len(running)} running, {len(self.waiting)} waiting, {len(self.failed)} failed"
        if self.undecided:
            whole += f", {len(self.undecided)} systems without a learning rate yet"
        self._progress.start()
        shown: dict[Job | None, tuple[str, int, int]] = {None: (whole, self.done, len(self.known))}
        shown |= {job: (job.name, job.step(), job.config.trainer.max_steps) for job in running[:MOST_BARS]}
        for job in [job for job in self._bars if job not in shown]:
            self._progress.remove_task(self._bars.pop(job))
        for job, (text, done, total) in shown.items():
            if job not in self._bars:
                self._bars[job] = self._progress.add_task(text, completed=done, total=total)
            self._progress.update(self._bars[job], description=text, completed=done, total=total)

    def _summary(self) -> None:
        """Say how it ended and what to do next."""
        say, total = self.console.print, len(self.known)
        say(f"{self.done} of {total} runs finished ({self.before} of them before), {len(self.failed)} failed")
        for name, line in self.failed.items():
            say(f"  failed: {name}: {line} (log: {self.folder / 'logs' / name}.log)")
        for name, reason in self.blocked.items():
            say(f"  not run: {name}: {reason}")
        if self.done < total or self.blocked:
            say("to go on: start the same command again")
        if self.done:
            say(f"table: python -m experiments.table {self.folder}")


@dataclass
class Options:
    """What the command is told."""

    file: Path = option(MISSING, "a sweep file, such as configs/sweep/lra_mini.yaml", positional=True)
    task: list[str] = option([], "of the sweep's tasks only these")
    model: list[str] = option([], "of its models only these")
    seed: list[int] = option([], "of its seeds only these")
    preset: str = option("", "another size than the file's")
    runs: Path | None = option(None, "the sweep's folder, runs/NAME of the file when not given")
    jobs: int = option(0, "most runs at once, 0 for the file's jobs", ge=0)
    launcher: str = option("local", "where runs are started", choices=("local", "slurm"))
    dry_run: bool = option(False, "say what there is to do, and stop")
    shard: str = option("1/1", "do the i-th of n parts of the work, i/n")


@command(Options, __doc__, others=True)
def main(options: Options, words: list[str], command: Sequence[str] = TRAIN) -> int:
    """Read the file, then do the work or say what there is; ``command`` is what is called with each run's words."""
    asked = {"tasks": options.task, "models": options.model, "seeds": options.seed, "preset": options.preset}
    file = read_sweep(options.file, {key: value for key, value in asked.items() if value})
    folder = options.runs or Path("runs") / options.file.stem
    pairs = sharded(list(file.pairs(folder, words)), options.shard)
    if options.dry_run:
        return _dry_run(pairs)
    if not pairs:
        raise UsageError("expected at least one run, this part of the grid has none")
    what = (folder, options.jobs or file.jobs, file.threads, pairs[0].runs(None)[0], command)
    launcher = Slurm(*what, file.slurm) if options.launcher == "slurm" else Local(*what)
    return Sweep(pairs, folder, launcher).run()


def sharded(pairs: list[Pair], shard: str) -> list[Pair]:
    """Return the i-th of n parts: whole pairs where a rate is shared, else single runs."""
    first, slash, last = shard.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UsageError(f"shard: expected i/n with i from 1 to n, got {shard!r}")
    if not any(pair.tune for pair in pairs):
        pairs = [replace(pair, seeds=(seed,)) for pair in pairs for seed in pair.seeds]
    return pairs[int(first) - 1 :: int(last)]


def _dry_run(pairs: list[Pair]) -> int:
    for pair in pairs:
        rate = pair.recorded_rate()
        undecided = bool(pair.tune) and rate is None
        for job in pair.tune if undecided else pair.runs(rate):
            state = "finished" if job.finished() else "begun" if job.run_folder() else "new"
            sys.stdout.write(f"{state:<9} python -m chela.train {' '.join(job.words)}\n")
        if undecided:
            sys.stdout.write(f"{'then':<9} seeds {', '.join(map(str, pair.seeds))} of {pair.name} with the best rate\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
