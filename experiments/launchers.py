"""Where runs are started: here, as many at once as the machine has cores or GPUs for, or as Slurm job arrays."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from chela.core.errors import UsageError
from experiments.plan import Job, tail
from experiments.runs import read_json, write

TRAIN = (sys.executable, "-m", "chela.train")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
DEFAULTS = {"time": 60, "signal_delay_s": 120, "array_parallelism": 256}
MOST_TIMEOUTS = 100  # of one run, each followed by a requeue
LOOK_SECONDS = 2.0  # between two looks at the queue


class Ended(NamedTuple):
    """A run's process has ended."""

    job: Job
    status: int | None  # negative: killed by that signal; None: a scheduler took it away
    last_line: str  # that it wrote


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
class Launcher:
    """What the launchers have in common; ``stopping`` says what becomes of the runs when one is told to ``stop()``."""

    folder: Path  # the sweep's; logs and locks lie there
    jobs: int  # most runs at once; 0: as many as fit
    threads: int  # CPU threads of each process
    example: Job  # one of the runs, to see what a run takes
    command: Sequence[str] = TRAIN  # what is called with a run's words
    handles: dict[Job, Any] = field(default_factory=dict, init=False)  # of the runs that go: what tells how

    def training(self, job: Job) -> Training:
        """Return a run's process."""
        command = (*self.command, *job.words)
        return Training(command, self.threads, self._log(job), self.folder / "locks" / job.name)

    def _log(self, job: Job) -> Path:
        return self.folder / "logs" / f"{job.name}.log"

    def ended(self, job: Job, status: int | None) -> Ended:
        """Return how a run ended, with the last line that it wrote: an error says itself there."""
        lines = tail(self._log(job)).strip().splitlines() or [""]
        return Ended(job, status, lines[-1].strip()[:300])


@dataclass
class Local(Launcher):
    """Runs on this machine."""

    stopping = "the runs save and stop"

    def __post_init__(self) -> None:
        """Count the machine's GPUs and cores."""
        trainer = self.example.config.trainer
        gpus = _visible_gpus() if trainer.accelerator != "cpu" else []
        self._free_gpus, have = gpus, len(gpus)
        if have < trainer.devices and (gpus or trainer.accelerator == "gpu"):
            raise UsageError(f"trainer.devices: expected up to the {have} GPUs of this machine, got {trainer.devices}")
        self._gpus_each = trainer.devices if gpus else 0
        fits = have // self._gpus_each if gpus else _cores() // (self.threads * trainer.devices)
        self.jobs = self.jobs or max(1, fits)

    def room(self) -> int:
        """Return how many more runs fit."""
        free = self.jobs - len(self.handles)
        return min(free, len(self._free_gpus) // self._gpus_each) if self._gpus_each else free

    def start(self, jobs: Sequence[Job]) -> list[Job]:
        """Start a process for each; return those that another launcher has."""
        for job in jobs:
            gpus = self._free_gpus[: self._gpus_each]
            if process := self.training(job).start(gpus):
                self._free_gpus = self._free_gpus[self._gpus_each :]
                self.handles[job] = (process, gpus)
        return [job for job in jobs if job not in self.handles]

    def poll(self) -> list[Ended]:
        """Collect the processes that have ended."""
        over = {job: process.poll() for job, (process, _) in self.handles.items() if process.poll() is not None}
        for job in over:
            self._free_gpus += self.handles.pop(job)[1]
        return [self.ended(job, status) for job, status in over.items()]

    def stop(self) -> list[Ended]:
        """Ask the runs to save and stop, and wait for them."""
        for process, _ in self.handles.values():
            process.send_signal(signal.SIGTERM)  # nothing happens to one that has ended
        for process, _ in self.handles.values():
            process.wait()
        return self.poll()


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
    """Runs as Slurm job arrays, through submitit (extra ``slurm``), in a folder that the nodes share.

    A run that reaches its time limit is asked to save, is put back into the queue, and goes on with ``resume=auto``.
    Submitted jobs are written down, so that a launcher that is started again watches them instead of submitting them
    anew; ending the launcher leaves them in the queue.
    """

    options: dict[str, Any] = field(default_factory=dict)  # words of submitit's SlurmExecutor, such as partition

    stopping = "the runs stay in the queue (scancel takes them out); start the sweep again to watch them"

    def __post_init__(self) -> None:
        """Prepare submitit's executor, and read what was submitted before."""
        trainer = self.example.config.trainer
        if trainer.num_nodes > 1:
            raise UsageError(f"trainer.num_nodes: expected 1 for launcher=slurm, got {trainer.num_nodes}")
        words = {"job_name": f"chela-{self.folder.name}", "cpus_per_task": self.threads * trainer.devices, **DEFAULTS}
        if trainer.accelerator == "gpu":
            words["gpus_per_node"] = trainer.devices
        if self.jobs:
            words["array_parallelism"] = self.jobs
        words |= self.options
        self.folder = self.folder.resolve()
        try:
            import submitit

            self._executor = submitit.SlurmExecutor(
                self.folder / "slurm", max_num_timeout=words.pop("max_num_timeout", MOST_TIMEOUTS)
            )
            self._executor.update_parameters(**words)
        except ImportError:
            raise UsageError("launcher=slurm: expected submitit, there is none: pip install 'chela[slurm]'") from None
        except RuntimeError:
            raise UsageError("launcher=slurm: expected Slurm's commands on this machine, there is no srun") from None
        except (ValueError, TypeError) as error:
            raise UsageError(f"slurm: expected words of submitit's SlurmExecutor, {error}") from None
        self._record = self.folder / "slurm" / "submitted.json"
        self._submitted: dict[str, str] = read_json(self._record)
        self._missing: Counter[Job] = Counter()  # looks in a row at which a run was not in the queue
        self._looked = 0.0

    def room(self) -> int:
        """Return a number that no sweep reaches: the queue takes all."""
        return 1_000_000

    def start(self, jobs: Sequence[Job]) -> list[Job]:
        """Submit an array of the runs that are not in the queue already."""
        import submitit

        queue = self._look(force=True) or set()
        known = {job: number for job in jobs if (number := self._submitted.get(job.name)) in queue}
        self.handles |= {job: submitit.SlurmJob(self._executor.folder, str(known[job])) for job in known}
        if new := [job for job in jobs if job not in known]:
            with self._executor.batch():
                handles = [self._executor.submit(self.training(job)) for job in new]
            self.handles |= dict(zip(new, handles, strict=True))
            self._submitted |= {job.name: self.handles[job].job_id for job in new}
            write(self._record, json.dumps(self._submitted, indent=1))
        return []

    def poll(self) -> list[Ended]:
        """Collect the runs that have left their result, or have left the queue without one."""
        queue = self._look()
        ended = []
        for job, handle in list(self.handles.items()):
            if queue is not None:
                self._missing[job] = 0 if handle.job_id in queue else self._missing[job] + 1
            if handle.paths.result_pickle.exists() or self._missing[job] > 2:
                del self.handles[job]
                ended.append(self._how(job, handle))
        return ended

    def _how(self, job: Job, handle: Any) -> Ended:
        if not handle.paths.result_pickle.exists():
            said = self.ended(job, None).last_line
            return Ended(job, None, f"job {handle.job_id} left the queue without a result: {said}")
        error = handle.exception()
        if error is None:
            return self.ended(job, handle.result())
        told = [line for line in str(error).splitlines() if "Error" in line]
        return Ended(job, None, (told or [str(error)])[-1][:300])

    def stop(self) -> list[Ended]:
        """Leave everything in the queue."""
        return []

    def _look(self, force: bool = False) -> set[str] | None:
        """Return the ids in the queue; None between two looks, or when the controller does not answer."""
        if not force and time.monotonic() - self._looked < LOOK_SECONDS:
            return None
        self._looked = time.monotonic()
        done = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i"], capture_output=True, text=True)
        return set(done.stdout.split()) if done.returncode == 0 else None
