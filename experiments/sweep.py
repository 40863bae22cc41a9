"""Run a grid of task × model × seed; finished runs are skipped, begun ones go on, others go on after a failed one.

chela sweep configs/sweep/lra_mini.yaml dry_run=true       what is done, what there is to do
chela sweep configs/sweep/lra_mini.yaml                    as many at once as there are cores or GPUs
chela sweep configs/sweep/lra_mini.yaml task=image seed=0  a part of the grid
chela sweep configs/sweep/lra.yaml launcher=slurm          as job arrays

Any key=value that is not listed below goes to every run, such as trainer.max_time=1h for a slice of each. Start it
again after whatever ended it: it goes on. See docs/sweeps.md.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from chela.config.schema import TrainerConfig
from chela.config.words import command
from chela.core.errors import DivergedError, UsageError, first_line
from chela.core.options import option
from experiments.plan import Job, Pair, read_sweep
from experiments.runs import RATES, add_rates, read_file

TRAIN = (sys.executable, "-m", "chela.train")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
SLURM = {"time": 60, "signal_delay_s": 120, "array_parallelism": 256, "max_num_timeout": 100}  # each is a requeue
STOPPED = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)  # the run reached its time limit or was asked to stop: saved
LOOK_SECONDS = 0.1  # from one look at the runs to the next

Ended = tuple[Job, int | None, str]  # a run, its exit status (None: not started, or lost), why it was lost


def say(name: str, line: str) -> None:
    """Print what happened to a run, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {name}: {line}", flush=True)


@dataclass
class Training:
    """A run's process, ``chela.train``. A node of a cluster calls it."""

    command: tuple[str, ...]  # with the run's words
    threads: int
    log: Path  # where the output goes
    pid: int = field(default=0, init=False)

    def start(self, gpus: Sequence[str] = ()) -> subprocess.Popen[bytes] | None:
        """Start the process, its threads pinned and its GPUs chosen; None when another one has the log's lock.

        The lock belongs to the open file, which the process inherits: it is free when the last of them is dead,
        whatever killed it. So a second launcher, or the one that follows a killed one, never doubles a run.
        """
        # without Slurm's variables, or Lightning would expect Slurm to start its processes
        env = {name: text for name, text in os.environ.items() if not name.startswith(("SLURM", "SUBMITIT_"))}
        env |= dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        env |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            command = [*self.command, "trainer.progress=plain"]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)

    def __call__(self) -> int:
        """Train; return the exit status (0, with nothing done, where another launcher works on this run)."""
        # The signal that announces the time limit goes to every process of the job; it is only for this one.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        process = self.start()
        self.pid = process.pid if process else 0
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        return process.wait() if process else 0

    def checkpoint(self) -> Any:
        """Let the run save and ask to be called again; submitit calls this when the time limit is near."""
        from submitit.helpers import DelayedSubmission

        if self.pid:
            os.kill(self.pid, signal.SIGTERM)
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)  # ``wait`` was interrupted and holds its lock
        return DelayedSubmission(Training(self.command, self.threads, self.log))


@dataclass
class Sweep:
    """Runs the grids of learning rates, chooses a rate for each pair, then runs all seeds; each event is a line."""

    pairs: list[Pair]  # the work, in order
    folder: Path  # of the runs and their logs
    jobs: int  # most runs at once; 0: as many as fit
    command: Sequence[str]  # what is called with a run's words
    asked: int = field(default=0, init=False)  # the signal that asked to stop
    known: set[Job] = field(default_factory=set, init=False)
    done: set[Job] = field(default_factory=set, init=False)  # of these; in a grid, diverging counts as finished
    failed: dict[str, str] = field(default_factory=dict, init=False)  # reasons, by the name of a run or a pair

    @property
    def trainer(self) -> TrainerConfig:
        """What each run takes."""
        return self.pairs[0].config.trainer

    def launch(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        """Yield runs as they end, until all have or it is ``asked`` to stop."""
        raise NotImplementedError

    def training(self, job: Job) -> Training:
        """Return a run's process."""
        log = self.folder / "logs" / f"{job.name}.log"
        return Training((*self.command, *job.words), self.trainer.threads, log)

    def run(self) -> int:
        """Work until nothing is left to do, and say how it ended; return the exit status."""
        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, self._stop))
            rates = read_file(self.folder / RATES)
            untuned = [pair for pair in self.pairs if pair.tune and pair.rate(rates) is None]
            self._work(job for pair in untuned for job in pair.tune)
            records = {pair.name: pair.choose_rate() for pair in untuned if self.done.issuperset(pair.tune)}
            rates = add_rates(self.folder, {name: record for name, record in records.items() if record})
            blocked = [pair.name for pair in untuned if not records.get(pair.name)]
            if not self.asked:
                self.failed |= dict.fromkeys(blocked, "no learning rate: its grid did not finish, or diverged")
            self._work(job for pair in self.pairs if pair.name not in blocked for job in pair.runs(pair.rate(rates)))
        print(f"{len(self.done)} of {len(self.known)} runs finished, {len(self.failed)} failed")
        for name, reason in self.failed.items():
            print(f"  failed: {name}: {reason}")
        if self.failed or self.known - self.done:
            print("to go on: start the same command again")
        if self.done:
            print(f"table: chela table {self.folder}")
        return 128 + self.asked if self.asked else 1 if self.failed else 0

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.asked = number

    def _work(self, jobs: Iterable[Job]) -> None:
        new = dict.fromkeys(jobs)  # in order, each once
        self.known |= set(new)
        self.done |= {job for job in new if job.finished()}
        for job, status, lost in self.launch([job for job in new if job not in self.done]):
            log, finished = self.training(job).log, job.finished()
            text = log.read_text(errors="replace").strip() if log.exists() else ""
            line = lost or text.rpartition("\n")[2].strip()[:300]
            if finished or (job.tunes and status == DivergedError.status):
                self.done.add(job)
                how = "finished" if finished else f"diverged: {line}"
                say(job.name, f"{how} ({len(self.done)}/{len(self.known)})")
            elif status in STOPPED or self.asked:
                say(job.name, "stopped")
            else:
                reason = f"killed by signal {-status}" if status and status < 0 else line or f"exit status {status}"
                job.record_failure(status, reason)
                self.failed[job.name] = f"{reason} (log: {log})"
                say(job.name, f"FAILED, the others go on: {reason}")


class Local(Sweep):
    """Runs are processes on this machine, as many at once as fit; asked to stop, they save first."""

    def launch(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        """Run a process for each, and yield how it ended; those that another launcher has come last."""
        waiting, free, announced = deque(jobs), deque(slots(self.trainer, self.jobs)), False
        going: dict[subprocess.Popen[bytes], tuple[Job, list[str]]] = {}
        while going or (waiting and not self.asked):
            if self.asked and not announced:
                announced = True
                for process in going:
                    process.terminate()  # nothing happens to one that has ended
            elif waiting and free and not self.asked:
                job = waiting.popleft()
                begun = job.folder.is_dir()
                if job.finished():  # by another launcher
                    yield job, None, ""
                elif started := self.training(job).start(free[0]):
                    going[started] = job, free.popleft()
                    say(job.name, "goes on" if begun else "started")
                else:
                    waiting.append(job)
            for process in [process for process in going if process.poll() is not None]:
                job, gpus = going.pop(process)
                free.append(gpus)
                yield job, process.returncode, ""
            time.sleep(LOOK_SECONDS)


def slots(trainer: TrainerConfig, jobs: int) -> list[list[str]]:
    """Return the GPUs of each run that there is room for, ``jobs`` at most: by GPUs where there are any, else cores."""
    import torch

    devices, visible = trainer.devices, os.environ.get("CUDA_VISIBLE_DEVICES", "")
    count = torch.cuda.device_count() if trainer.accelerator != "cpu" else 0
    gpus = visible.split(",")[:count] if visible else [str(index) for index in range(count)]
    room = [gpus[first : first + devices] for first in range(0, count - devices + 1, devices)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = room or [[]] * (jobs or max(1, cores // max(1, trainer.threads * devices)))
    return room[: jobs or None]


@dataclass
class Slurm(Sweep):
    """Runs are a Slurm job array, through submitit (extra ``slurm``), in a folder that the nodes share.

    A run that reaches its time limit is asked to save, is put back into the queue, and goes on with ``resume=auto``.
    Ending the launcher leaves its jobs in the queue (scancel takes them out); started again it submits what is not
    finished, and of a run that is there twice the later job does nothing.
    """

    options: dict[str, Any]  # words of submitit's SlurmExecutor, such as partition

    def __post_init__(self) -> None:
        cpus = self.trainer.threads * self.trainer.devices
        words = {"job_name": f"chela-{self.folder.name}", "cpus_per_task": cpus, **SLURM}
        words |= {"gpus_per_node": self.trainer.devices} if self.trainer.accelerator == "gpu" else {}
        words |= {"array_parallelism": self.jobs} if self.jobs else {}
        words |= self.options
        self.folder = self.folder.resolve()
        try:
            import submitit

            self._executor = submitit.SlurmExecutor(self.folder / "slurm", max_num_timeout=words.pop("max_num_timeout"))
            self._executor.update_parameters(**words)
        except ImportError:
            raise UsageError("launcher=slurm needs submitit: pip install submitit") from None
        except (RuntimeError, ValueError, TypeError) as error:
            raise UsageError(f"slurm: expected Slurm and words of submitit's SlurmExecutor, {error}") from None

    def launch(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        """Submit them as one array, and yield each as it ends, until asked to stop."""
        jobs = [] if self.asked else jobs
        submitted = self._executor.submit_array([self.training(job) for job in jobs]) if jobs else []
        waiting = dict(zip(jobs, submitted, strict=True))
        for job, handle in waiting.items():
            say(job.name, f"submitted as {handle.job_id}")
        while waiting and not self.asked:
            for job in [job for job, handle in waiting.items() if handle.done()]:
                handle = waiting.pop(job)
                error = handle.exception()
                yield job, None if error else handle.result(), first_line(error) if error else ""
            time.sleep(5 * LOOK_SECONDS)


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
    """Read the file, then run it or list what there is; ``command`` is called with each run's words."""
    file = read_sweep(options.file, options.task, options.model, options.preset)
    folder = options.runs or Path("runs") / options.file.stem
    pairs = list(file.pairs(folder, words, options.seed))
    if options.dry_run:
        return _dry_run(pairs, read_file(folder / RATES))
    if not pairs:
        raise UsageError("expected at least one run, this part of the grid has none")
    arguments = (pairs, folder, options.jobs, command)
    return (Slurm(*arguments, file.slurm) if options.launcher == "slurm" else Local(*arguments)).run()


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
