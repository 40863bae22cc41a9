"""Where runs are started: as processes on this machine, or as a Slurm job array."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chela.core.errors import UsageError
from experiments.plan import Job, tail

TRAIN = (sys.executable, "-m", "chela.train")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
SLURM = {"time": 60, "signal_delay_s": 120, "array_parallelism": 256, "max_num_timeout": 100}  # each is a requeue
LOOK_SECONDS = 0.1  # from one look at the runs to the next

Ended = tuple[Job, int | None, str]
"""A run, its exit status (negative: the signal that killed it; None: it was not started, or a scheduler took it away),
and the last line that it wrote: an error says itself there."""


def say(name: str, line: str) -> None:
    """Print what happened to a run, a pair or the sweep, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {name}: {line}", flush=True)


@dataclass
class Training:
    """A run's process, ``chela.train``; called, what a node of a cluster runs."""

    command: tuple[str, ...]  # with the run's words
    threads: int
    log: Path  # where the output goes
    pid: int = field(default=0, init=False)

    def start(self, gpus: Sequence[str] = ()) -> subprocess.Popen[bytes] | None:
        """Start the process, its threads pinned and its GPUs chosen; None when another one has the log's lock.

        The lock belongs to the open file, which the process inherits: it is free when the last of them is dead,
        whatever killed it. A second launcher, or the one that follows a killed one, therefore never doubles a run.
        """
        # without Slurm's variables, by which Lightning would think that Slurm starts its processes
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

    def last_line(self) -> str:
        """Return what it wrote last."""
        return (tail(self.log).strip().splitlines() or [""])[-1].strip()[:300]

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
        return DelayedSubmission(Training(self.command, self.threads, self.log))


@dataclass
class Launcher:
    """What both launchers are told; each has ``run(jobs)``, which yields runs as they end."""

    folder: Path  # the sweep's; logs lie there
    jobs: int  # most runs at once; 0: as many as fit
    threads: int  # CPU threads of each process
    example: Job  # one of the runs, to see what a run takes
    command: Sequence[str] = TRAIN  # what is called with a run's words
    asked: bool = field(default=False, init=False)  # to stop

    def stop(self) -> None:
        """Start no more, and let ``run`` come to its end."""
        self.asked = True

    def training(self, job: Job) -> Training:
        """Return a run's process."""
        return Training((*self.command, *job.words), self.threads, self.folder / "logs" / f"{job.name}.log")


@dataclass
class Local(Launcher):
    """Processes on this machine, as many at once as fit."""

    stopping = "the runs save and stop"

    def __post_init__(self) -> None:
        """Count the machine's GPUs and cores, by which runs fit."""
        import torch

        trainer, visible = self.example.config.trainer, os.environ.get("CUDA_VISIBLE_DEVICES", "")
        count = torch.cuda.device_count() if trainer.accelerator != "cpu" else 0
        gpus = visible.split(",")[:count] if visible else [str(index) for index in range(count)]
        firsts = range(0, count - trainer.devices + 1, trainer.devices)
        slots = [gpus[first : first + trainer.devices] for first in firsts]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        slots = slots or [[]] * (self.jobs or max(1, cores // (self.threads * trainer.devices)))
        self.slots = deque(slots[: self.jobs or None])  # the GPUs of each run that may start now
        self._going: dict[subprocess.Popen[bytes], tuple[Job, list[str]]] = {}

    def run(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        """Run a process for each, and yield how it ended; those that another launcher has come last."""
        waiting = deque(jobs)
        while self._going or (waiting and not self.asked):
            if waiting and self.slots and not self.asked:
                job = waiting.popleft()
                step = job.step()
                if job.finished():  # by another launcher
                    yield job, None, ""
                elif process := self.training(job).start(self.slots[0]):
                    self._going[process] = job, self.slots.popleft()
                    say(job.name, f"goes on from step {step}" if step else "started")
                    if self.asked:  # in between
                        process.terminate()
                else:
                    waiting.append(job)
            for process in [process for process in self._going if process.poll() is not None]:
                job, gpus = self._going.pop(process)
                self.slots.append(gpus)
                yield job, process.returncode, self.training(job).last_line()
            time.sleep(LOOK_SECONDS)

    def stop(self) -> None:
        """Ask the runs to save and stop; no other is started."""
        super().stop()
        for process in list(self._going):
            process.terminate()  # nothing happens to one that has ended


@dataclass
class Slurm(Launcher):
    """A Slurm job array, through submitit (extra ``slurm``), in a folder that the nodes share.

    A run that reaches its time limit is asked to save, is put back into the queue, and goes on with ``resume=auto``.
    Ending the launcher leaves its jobs in the queue; started again it submits what is not finished, and of a run that
    is there twice the later job does nothing.
    """

    options: dict[str, Any] = field(default_factory=dict)  # words of submitit's SlurmExecutor, such as partition

    stopping = "the runs stay in the queue (scancel takes them out)"

    def __post_init__(self) -> None:
        """Prepare submitit's executor."""
        trainer = self.example.config.trainer
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
            raise UsageError("launcher=slurm needs submitit: pip install 'chela-attention[slurm]'") from None
        except (RuntimeError, ValueError, TypeError) as error:
            raise UsageError(f"slurm: expected Slurm and words of submitit's SlurmExecutor, {error}") from None

    def run(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        """Submit them as one array, and yield each as it ends, until asked to stop."""
        submitted = self._executor.submit_array([self.training(job) for job in jobs]) if jobs else []
        waiting = dict(zip(jobs, submitted, strict=True))
        for job, handle in waiting.items():
            say(job.name, f"submitted as {handle.job_id}")
        while waiting and not self.asked:
            for job in [job for job, handle in waiting.items() if handle.done()]:
                handle = waiting.pop(job)
                if error := handle.exception():
                    told = [line for line in str(error).splitlines() if "Error" in line] or [str(error)]
                    yield job, None, told[-1][:300]
                else:
                    yield job, handle.result(), self.training(job).last_line()
            time.sleep(5 * LOOK_SECONDS)
