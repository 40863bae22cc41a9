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
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from types import FrameType

from chela.config.words import command
from chela.core.errors import DivergedError, UsageError
from chela.core.options import option
from experiments.launchers import TRAIN, Ended, Launcher, Local, Slurm, say
from experiments.plan import Job, Pair, read_sweep

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # the run was asked to stop, and saved


@dataclass
class Sweep:
    """Runs the grids of learning rates, chooses a rate for each pair, then runs all seeds; each event is a line."""

    pairs: list[Pair]  # the work, in order
    launcher: Launcher
    known: set[Job] = field(default_factory=set)
    before: int = 0  # runs that were finished before
    done: int = 0  # and in all
    diverged: set[Job] = field(default_factory=set)  # runs of a grid: an answer, no failure
    failed: dict[str, str] = field(default_factory=dict)  # by the run's name: its last line
    blocked: dict[str, str] = field(default_factory=dict)  # by the pair's name: why its seeds cannot be run
    asked: int = 0  # the signal that asked to stop

    def run(self) -> int:
        """Work until nothing is left to do, and say how it ended; return the exit status."""
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            untuned = [pair for pair in self.pairs if pair.tune and pair.recorded_rate() is None]
            self._work(job for pair in untuned for job in pair.tune)
            for pair in untuned:
                self._choose(pair)
            ready = [pair for pair in self.pairs if not pair.tune or pair.recorded_rate() is not None]
            self._work(job for pair in ready for job in pair.runs(pair.recorded_rate()))
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
            self._settle(ended)

    def _settle(self, ended: Ended) -> None:
        job, status, line, _ = ended
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
            job.record_failure(status, line)
            self.failed[job.name] = line or f"exit status {status}"
            say(job.name, f"FAILED, the others go on: {self.failed[job.name]}")

    def _finish(self, job: Job, how: str) -> None:
        self.done += 1
        say(job.name, f"{how} ({self.done}/{len(self.known)})")

    def _choose(self, pair: Pair) -> None:
        """Choose the rate when each run of the grid is finished or has diverged; note a grid that cannot be."""
        unfinished = [job.name for job in pair.tune if job not in self.diverged and not job.finished()]
        if not unfinished and not self.diverged.issuperset(pair.tune):
            say(pair.name, f"learning rate {pair.choose_rate()} chosen on validation")
            return
        reason = f"no learning rate yet, as {', '.join(unfinished)} did not finish"
        self.blocked[pair.name] = reason if unfinished else "training diverged at every learning rate of the grid"

    def _summary(self) -> None:
        """Say how it ended and what to do next."""
        if self.asked:
            say("asked to stop", self.launcher.stopping)
        total = len(self.known)
        lines = [f"{self.done} of {total} runs finished ({self.before} of them before), {len(self.failed)} failed"]
        for name, line in self.failed.items():
            lines.append(f"  failed: {name}: {line} (log: {self.launcher.folder / 'logs' / name}.log)")
        lines += [f"  not run: {name}: {reason}" for name, reason in self.blocked.items()]
        lines += ["to go on: start the same command again"] if self.done < total or self.blocked else []
        lines += [f"table: python -m experiments.table {self.launcher.folder}"] if self.done else []
        sys.stdout.writelines(f"{line}\n" for line in lines)


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
    return Sweep(pairs, Slurm(*what, file.slurm) if options.launcher == "slurm" else Local(*what)).run()


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
            state = "finished" if job.finished() else "begun" if job.folder.is_dir() else "new"
            sys.stdout.write(f"{state:<9} python -m chela.train {' '.join(job.words)}\n")
        if undecided:
            sys.stdout.write(f"{'then':<9} seeds {', '.join(map(str, pair.seeds))} of {pair.name} with the best rate\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
