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
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from chela.config.words import command
from chela.core.errors import DivergedError, UsageError
from chela.core.files import locked
from chela.core.options import option
from experiments.launchers import TRAIN, Local, Slurm, say
from experiments.plan import Job, Pair, read_sweep
from experiments.runs import RATES, add_rates, read_rates

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # the run was asked to stop, and saved


@dataclass
class Sweep:
    """Runs the grids of learning rates, chooses a rate for each pair, then runs all seeds; each event is a line."""

    pairs: list[Pair]  # the work, in order
    launcher: Local | Slurm
    known: set[Job] = field(default_factory=set)
    before: int = 0  # runs that were finished before
    done: int = 0  # and in all
    diverged: set[Job] = field(default_factory=set)  # runs of a grid: an answer, no failure
    failed: dict[str, str] = field(default_factory=dict)  # by the run's name: its last line
    blocked: dict[str, str] = field(default_factory=dict)  # by the pair's name: why its seeds cannot be run
    asked: int = 0  # the signal that asked to stop

    def run(self) -> int:
        """Work until nothing is left to do, and say how it ended; return the exit status."""
        folder = self.launcher.folder
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            rates = read_rates(folder)
            untuned = [pair for pair in self.pairs if pair.tune and pair.rate(rates) is None]
            self._work(job for pair in untuned for job in pair.tune)
            if chosen := {pair.name: pair.choose_rate() for pair in untuned if self._may_choose(pair)}:
                with locked(folder / RATES):  # another launcher may work on other pairs
                    rates = add_rates(folder, chosen)
            ready = [pair for pair in self.pairs if pair.name not in self.blocked]
            self._work(job for pair in ready for job in pair.runs(pair.rate(rates)))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self._summary()
        return 128 + self.asked if self.asked else 1 if self.failed or self.blocked else 0

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        self.launcher.stop()

    def _work(self, jobs: Iterable[Job]) -> None:
        """Run what is not finished."""
        new = list(dict.fromkeys(jobs))
        todo = [job for job in new if not job.finished()]
        for job in set(new).difference(todo):
            job.clear_failure()
        self.known |= set(new)
        self.before += len(new) - len(todo)
        self.done += len(new) - len(todo)
        for ended in self.launcher.run([] if self.asked else todo):
            self._settle(*ended)

    def _settle(self, job: Job, status: int | None, line: str) -> None:
        if job.finished():
            job.clear_failure()
            self._finish(job, "finished")
        elif status in (0, *STOPPED) or self.asked:
            if status is not None:
                say(job.name, f"stopped at step {job.step()} of {job.config.trainer.max_steps}")
        elif job.tunes and status == DivergedError.status:
            self.diverged.add(job)
            self._finish(job, f"diverged: {line}")
        else:
            reason = f"killed by signal {-status}" if status and status < 0 else line or f"exit status {status}"
            job.record_failure(status, reason)
            self.failed[job.name] = reason
            say(job.name, f"FAILED, the others go on: {reason}")

    def _finish(self, job: Job, how: str) -> None:
        self.done += 1
        say(job.name, f"{how} ({self.done}/{len(self.known)})")

    def _may_choose(self, pair: Pair) -> bool:
        """Whether each run of a grid is finished or has diverged, and not all of them have; else note why not."""
        if unfinished := [job.name for job in pair.tune if job not in self.diverged and not job.finished()]:
            self.blocked[pair.name] = f"no learning rate yet, as {', '.join(unfinished)} did not finish"
        elif self.diverged.issuperset(pair.tune):
            self.blocked[pair.name] = "training diverged at every learning rate of the grid"
        return pair.name not in self.blocked

    def _summary(self) -> None:
        """Say how it ended and what to do next."""
        if self.asked:
            say("asked to stop", self.launcher.stopping)
        total, folder = len(self.known), self.launcher.folder
        print(f"{self.done} of {total} runs finished ({self.before} of them before), {len(self.failed)} failed")
        for name, line in self.failed.items():
            print(f"  failed: {name}: {line} (log: {folder / 'logs' / name}.log)")
        for name, reason in self.blocked.items():
            print(f"  not run: {name}: {reason}")
        if self.done < total or self.blocked:
            print("to go on: start the same command again")
        if self.done:
            print(f"table: chela table {folder}")


@dataclass
class Options:
    """What the command is told."""

    file: Path = option(MISSING, "a sweep file, such as configs/sweep/lra_mini.yaml", positional=True)
    task: list[str] = option([], "of the sweep's tasks only these")
    model: list[str] = option([], "of its models only these")
    seed: list[int] = option([], "of its seeds only these")
    preset: str = option("", "another size than the file's")
    runs: Path | None = option(None, "the sweep's folder, runs/NAME of the file when not given")
    jobs: int = option(0, "most runs at once, 0 for as many as fit", ge=0)
    launcher: str = option("local", "where runs are started", choices=("local", "slurm"))
    dry_run: bool = option(False, "say what there is to do, and stop")


@command(Options, __doc__, others=True)
def main(options: Options, words: list[str], command: Sequence[str] = TRAIN) -> int:
    """Read the file, then do the work or say what there is; ``command`` is what is called with each run's words."""
    file = read_sweep(options.file, options.task, options.model, options.preset)
    folder = options.runs or Path("runs") / options.file.stem
    pairs = list(file.pairs(folder, words, options.seed))
    if options.dry_run:
        return _dry_run(pairs, read_rates(folder))
    if not pairs:
        raise UsageError("expected at least one run, this part of the grid has none")
    what = (folder, options.jobs, file.threads, pairs[0].runs(None)[0], command)
    return Sweep(pairs, Slurm(*what, file.slurm) if options.launcher == "slurm" else Local(*what)).run()


def _dry_run(pairs: list[Pair], rates: dict[str, Any]) -> int:
    for pair in pairs:
        rate = pair.rate(rates)
        undecided = bool(pair.tune) and rate is None
        for job in pair.tune if undecided else pair.runs(rate):
            state = "finished" if job.finished() else "begun" if job.folder.is_dir() else "new"
            print(f"{state:<9} chela train {' '.join(job.words)}")
        if undecided:
            print(f"{'then':<9} seeds {', '.join(map(str, pair.seeds))} of {pair.name} with the best rate")
    return 0


if __name__ == "__main__":
    sys.exit(main())
