"""Where runs are started: a pool of processes on this machine, or Slurm job arrays."""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from chela.core.errors import UsageError
from experiments.plan import Job, tail

TRAIN = (sys.executable, "-m", "chela.train")
ATTEMPTS = 3  # of a run that is killed, in one launch of the sweep
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
SLURM = {"time": 60, "signal_delay_s": 120, "array_parallelism": 256, "max_num_timeout": 100}  # each is a requeue
LOOK_SECONDS = 0.5  # until a run that another launcher has is looked at again


class Ended(NamedTuple):
    """A run's process has ended, or was left to another launcher."""

    job: Job
    status: int | None  # negative: killed by that signal; None: a scheduler took it away, or it was not started
    last_line: str = ""  # that it wrote
    elsewhere: bool = False


def say(name: str, line: str) -> None:
    """Print what happened to a run, a pair or the sweep, with the time of day."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')}  {name}: {line}\n")
    sys.stdout.flush()


@dataclass
class Launcher:
    """What the launchers have in common."""

    folder: Path  # the sweep's; logs and locks lie there
    jobs: int  # most runs at once; 0: as many as fit
    threads: int  # CPU threads of each process
    example: Job  # one of the runs, to see what a run takes
    command: Sequence[str] = TRAIN  # what is called with a run's words
    asked: bool = field(default=False, init=False)  # to stop
    stopping = ""  # what then becomes of the runs

    def run(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        """Run them, and yield each as it ends."""
        raise NotImplementedError

    def stop(self) -> None:
        """Start no more, and let ``run`` come to its end."""
        self.asked = True

    def training(self, job: Job) -> Training:
        """Return a run's process."""
        return Training((*self.command, *job.words), self.threads, self.log(job), self.folder / "locks" / job.name)

    def log(self, job: Job) -> Path:
        """Return the file of a run's output."""
        return self.folder / "logs" / f"{job.name}.log"

    def ended(self, job: Job, status: int | None) -> Ended:
        """Return how a run ended, with the last line that it wrote: an error says itself there."""
        lines = tail(self.log(job)).strip().splitlines() or [""]
        return Ended(job, status, lines[-1].strip()[:300])


@dataclass
class Training:
    """A run's process, ``chela.train``; called, what a node of a cluster runs."""

    command: tuple[str, ...]  # with the run's words
    threads: int
    log: Path  # where the output goes
    lock: Path  # held while it runs
    pid: int = field(default=0, init=False)

    def start(self, gpus: Sequence[str] = ()) -> subprocess.Popen[bytes] | None:
        """Start the process, its threads pinned and its GPUs chosen; None when another one holds the lock.

        The lock belongs to the open file, which the process inherits: it is free when the last of them is dead,
        whatever killed it. A second launcher, or the one that follows a killed one, therefore never doubles a run.
        (``filelock`` keeps its file to itself, so its lock would fall with the launcher.)
        """
        env = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(self.threads))}
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        for name in [name for name in env if name.startswith(("SLURM_", "SLURMD_", "SUBMITIT_"))]:
            del env[name]  # by them Lightning would think that Slurm starts its processes
        for path in (self.log, self.lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.lock, "ab") as held, open(self.log, "ab") as log:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            command, passed = [*self.command, "trainer.progress=plain"], [held.fileno()]
            nothing, same = subprocess.DEVNULL, subprocess.STDOUT
            return subprocess.Popen(command, stdin=nothing, stdout=log, stderr=same, env=env, pass_fds=passed)

    def __call__(self) -> int:
        """Train; return the exit status (0, with nothing done, when somebody else works on this run)."""
        # The signal that announces the time limit goes to every process of the job; it is only for this one.
        announcement = {signal.SIGUSR2}
        signal.pthread_sigmask(signal.SIG_BLOCK, announcement)
        process = self.start()
        self.pid = process.pid if process else 0
        signal.pthread_sigmask(signal.SIG_UNBLOCK, announcement)
        while process and process.poll() is None:  # not wait(): the signal's handler must not find its lock taken
            time.sleep(0.2)
        return process.returncode if process else 0

    def checkpoint(self) -> Any:
        """Let the run save and ask to be called again; submitit calls this when the time limit is near."""
        from submitit.helpers import DelayedSubmission

        if self.pid:
            os.kill(self.pid, signal.SIGTERM)
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Training(self.command, self.threads, self.log, self.lock))


@dataclass
class Local(Launcher):
    """A pool of processes on this machine."""

    stopping = "the runs save and stop"

    def __post_init__(self) -> None:
        """Count the machine's GPUs and cores, by which runs fit."""
        trainer = self.example.config.trainer
        gpus, each = _visible_gpus() if trainer.accelerator != "cpu" else [], trainer.devices
        if len(gpus) < each and (gpus or trainer.accelerator == "gpu"):
            raise UsageError(f"trainer.devices: expected up to the {len(gpus)} GPUs of this machine, got {each}")
        slots = [gpus[first : first + each] for first in range(0, len(gpus) - each + 1, each)]
        if not gpus:
            slots = [[]] * (self.jobs or max(1, _cores() // (self.threads * each)))
        self.slots = deque(slots[: self.jobs or None])  # the GPUs of each run that may start now
        self._processes: set[subprocess.Popen[bytes]] = set()

    def run(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        """Run a process for each, and yield how it ended; those that another launcher has come last."""
        with ThreadPoolExecutor(len(self.slots)) as pool:
            going = {pool.submit(self._train, job) for job in jobs}
            while going:
                done, going = wait(going, return_when=FIRST_COMPLETED)
                for ended in (future.result() for future in done):
                    if ended.elsewhere and not self.asked:
                        going.add(pool.submit(self._train, ended.job))
                    else:
                        yield ended

    def _train(self, job: Job) -> Ended:
        gpus, status = self.slots.popleft(), None  # there is one for each thread of the pool
        try:
            for attempt in range(ATTEMPTS):
                if self.asked or job.finished():  # by another launcher, while it waited here
                    return Ended(job, status)
                step = job.step()
                if (process := self.training(job).start(gpus)) is None:
                    time.sleep(LOOK_SECONDS)
                    return Ended(job, None, elsewhere=True)
                self._processes.add(process)
                say(job.name, f"goes on from step {step}" if step else "started")
                if self.asked:
                    process.terminate()
                status = process.wait()
                self._processes.discard(process)
                if status >= 0 or attempt == ATTEMPTS - 1 or job.finished():
                    break
                say(job.name, f"killed by signal {-status}, goes on from its last checkpoint")
            return self.ended(job, status)
        finally:
            self.slots.append(gpus)

    def stop(self) -> None:
        """Ask the runs to save and stop; no other is started."""
        super().stop()
        for process in list(self._processes):
            process.terminate()  # nothing happens to one that has ended


def _visible_gpus() -> list[str]:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        names = (name.strip() for name in listed.split(","))
        return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))  # as CUDA reads it
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Slurm(Launcher):
    """Slurm job arrays, through submitit (extra ``slurm``), in a folder that the nodes share.

    A run that reaches its time limit is asked to save, is put back into the queue, and goes on with ``resume=auto``.
    Ending the launcher leaves its jobs in the queue; started again it submits what is not finished, and of a run that
    is there twice the later job does nothing.
    """

    options: dict[str, Any] = field(default_factory=dict)  # words of submitit's SlurmExecutor, such as partition

    stopping = "the runs stay in the queue (scancel takes them out)"

    def __post_init__(self) -> None:
        """Prepare submitit's executor."""
        trainer = self.example.config.trainer
        if trainer.num_nodes > 1:
            raise UsageError(f"trainer.num_nodes: expected 1 for launcher=slurm, got {trainer.num_nodes}")
        words = {"job_name": f"chela-{self.folder.name}", "cpus_per_task": self.threads * trainer.devices, **SLURM}
        words |= {"gpus_per_node": trainer.devices} if trainer.accelerator == "gpu" else {}
        words |= {"array_parallelism": self.jobs} if self.jobs else {}
        words |= self.options
        self.folder = self.folder.resolve()
        try:
            import submitit

            self._executor = submitit.SlurmExecutor(self.folder / "slurm", max_num_timeout=words.pop("max_num_timeout"))
            self._executor.update_parameters(**words)
        except ImportError:
            raise UsageError("launcher=slurm: expected submitit, there is none: pip install 'chela[slurm]'") from None
        except RuntimeError:
            raise UsageError("launcher=slurm: expected Slurm's commands on this machine, there is no srun") from None
        except (ValueError, TypeError) as error:
            raise UsageError(f"slurm: expected words of submitit's SlurmExecutor, {error}") from None

    def run(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        """Submit them as one array, and yield each as it ends, until asked to stop."""
        submitted = self._executor.submit_array([self.training(job) for job in jobs]) if jobs else []
        waiting = dict(zip(jobs, submitted, strict=True))
        for job, handle in waiting.items():
            say(job.name, f"submitted as {handle.job_id}")
        while waiting and not self.asked:
            for job in [job for job, handle in waiting.items() if handle.done()]:
                handle = waiting.pop(job)
                error = handle.exception()
                told = [line for line in str(error).splitlines() if "Error" in line] or [str(error)]
                yield Ended(job, None, told[-1][:300]) if error else self.ended(job, handle.result())
            time.sleep(LOOK_SECONDS)
