"""Where runs are started: here a process each, as many at once as the machine has cores or GPUs for.

A launcher has ``room()``, ``start(jobs)``, ``poll()`` and ``stop()``; ``experiments.slurm`` has the other one.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from chela.config import cuda_devices
from chela.errors import UsageError
from experiments.plan import Job

TRAIN = (sys.executable, "-m", "chela.train")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Ended:
    """A run's process has ended.

    Args:
        job: The run.
        status: Exit status; negative: killed by that signal; None: a scheduler took it away.
        last_line: The last line it wrote.
    """

    job: Job
    status: int | None
    last_line: str


class Launcher(Protocol):
    """What the sweep asks of a launcher; ``stopping`` says what becomes of the runs when the sweep is asked to stop."""

    stopping: str

    def room(self) -> int:
        """Return how many more runs may be started now."""

    def start(self, jobs: Sequence[Job]) -> list[Job]:
        """Start them; return those that another launcher has in its hands."""

    def poll(self) -> list[Ended]:
        """Return what has ended since the last call."""

    def running(self) -> list[Job]:
        """Return what runs now."""

    def stop(self) -> list[Ended]:
        """Let the runs save and stop."""


class RunLock:
    """Says that a run is in somebody's hands, on this machine or (where the file system has ``flock``) another.

    The lock belongs to the open file, which the run's process inherits: it is free when the last of them is dead,
    whatever killed it. A second launcher, or the one that follows a killed one, therefore never doubles a run.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def take(self) -> bool:
        """Return whether the lock could be taken."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            return False
        return True

    def descriptor(self) -> int:
        """Return the descriptor that the process is to inherit."""
        return self._file.fileno()

    def close(self) -> None:
        """Let go of it here; the process keeps it."""
        self._file.close()


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    devices: tuple[str, ...]


class Local:
    """Runs on this machine.

    Args:
        folder: The sweep's folder; logs and locks lie there.
        jobs: Most runs at once; 0: as many as there are cores or GPUs for.
        threads: CPU threads of each process.
        example: One of the runs, to see what a run takes.
        command: What is called with a run's words.
    """

    stopping = "the runs save and stop"

    def __init__(self, folder: Path, jobs: int, threads: int, example: Job, command: Sequence[str] = TRAIN) -> None:
        self.folder, self.threads, self.command = folder, threads, tuple(command)
        trainer = example.config.trainer
        gpus = _visible_gpus() if trainer.accelerator != "cpu" else []
        if len(gpus) < trainer.devices and (gpus or trainer.accelerator == "gpu"):
            raise UsageError(
                f"trainer.devices: expected up to the {len(gpus)} GPUs of this machine, got {trainer.devices}"
            )
        self._free_gpus = gpus
        self._gpus_each = trainer.devices if gpus else 0
        fits = len(gpus) // self._gpus_each if gpus else _cores() // (threads * trainer.devices)
        self.most = jobs or max(1, fits)
        self._running: list[_Running] = []

    def room(self) -> int:
        """Return how many more runs fit."""
        free = self.most - len(self._running)
        return min(free, len(self._free_gpus) // self._gpus_each) if self._gpus_each else free

    def start(self, jobs: Sequence[Job]) -> list[Job]:
        """Start a process for each; return those that another launcher has."""
        return [job for job in jobs if not self._start(job)]

    def _start(self, job: Job) -> bool:
        lock = RunLock(self.folder / "locks" / job.name)
        if not lock.take():
            return False
        devices, self._free_gpus = tuple(self._free_gpus[: self._gpus_each]), self._free_gpus[self._gpus_each :]
        log = log_file(self.folder, job)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [*self.command, *job.words, "trainer.progress=plain"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(self.threads, devices),
                pass_fds=[lock.descriptor()],
            )
        lock.close()
        self._running.append(_Running(job, process, devices))
        return True

    def running(self) -> list[Job]:
        """Return the runs whose processes live."""
        return [entry.job for entry in self._running]

    def poll(self) -> list[Ended]:
        """Collect the processes that have ended."""
        over = [entry for entry in self._running if entry.process.poll() is not None]
        self._running = [entry for entry in self._running if entry not in over]
        for entry in over:
            self._free_gpus.extend(entry.devices)
        return [Ended(entry.job, entry.process.returncode, last_line(self.folder, entry.job)) for entry in over]

    def stop(self) -> list[Ended]:
        """Ask the runs to save and stop, and wait for them."""
        for entry in self._running:
            if entry.process.poll() is None:
                entry.process.send_signal(signal.SIGTERM)
        for entry in self._running:
            entry.process.wait()
        return self.poll()


def log_file(folder: Path, job: Job) -> Path:
    """Return where a run's output goes."""
    return folder / "logs" / f"{job.name}.log"


def last_line(folder: Path, job: Job) -> str:
    """Return the last line that a run wrote: an error says itself there."""
    try:
        with open(log_file(folder, job), "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4000))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip()[:300] if lines else ""


def environment(threads: int, devices: Sequence[str] = ()) -> dict[str, str]:
    """Return a run's environment: its threads pinned, its GPUs chosen."""
    env = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    if devices:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return env


def _visible_gpus() -> list[str]:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        names = (name.strip() for name in listed.split(","))
        return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))  # as CUDA reads it
    return [str(index) for index in range(cuda_devices())]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
