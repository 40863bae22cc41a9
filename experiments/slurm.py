"""Runs as Slurm job arrays, through submitit (extra ``slurm``).

A run that reaches its time limit is asked to save, is put back into the queue, and goes on with ``resume=auto``.
Submitted jobs are written down, so that a launcher that is started again watches them instead of submitting them anew;
ending the launcher leaves them in the queue.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chela.errors import UsageError
from experiments.launchers import TRAIN, Ended, RunLock, environment, last_line, log_file
from experiments.plan import Job

DEFAULTS = {"time": 60, "signal_delay_s": 120, "array_parallelism": 256}
MOST_TIMEOUTS = 100  # of one run, each followed by a requeue
LOOK_SECONDS = 2.0  # between two looks at the queue


@dataclass
class Training:
    """What a node runs: ``chela.train`` in a process of its own, so that a signal can be passed on to it.

    Args:
        command: What is called.
        words: The run's words.
        threads: CPU threads.
        log: Where the output goes.
        lock: Held while it runs.
    """

    command: tuple[str, ...]
    words: tuple[str, ...]
    threads: int
    log: Path
    lock: Path
    pid: int = field(default=0, init=False)

    def __call__(self) -> int:
        """Train; return the exit status (0, with nothing done, when somebody else works on this run)."""
        lock = RunLock(self.lock)
        if not lock.take():
            return 0
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # The signal that announces the time limit goes to every process of the job; it is only for this one.
        announcement = {signal.SIGUSR2}
        signal.pthread_sigmask(signal.SIG_BLOCK, announcement)
        with open(self.log, "ab") as output:
            process = subprocess.Popen(
                [*self.command, *self.words, "trainer.progress=plain"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_without_slurm(environment(self.threads)),
                pass_fds=[lock.descriptor()],
            )
        self.pid = process.pid
        signal.pthread_sigmask(signal.SIG_UNBLOCK, announcement)
        lock.close()
        while process.poll() is None:  # not wait(): the signal's handler must not find its lock taken
            time.sleep(0.2)
        return process.returncode

    def checkpoint(self) -> Any:
        """Called when the time limit is near: let the run save, and ask to be called again."""
        from submitit.helpers import DelayedSubmission

        if self.pid:
            os.kill(self.pid, signal.SIGTERM)
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Training(self.command, self.words, self.threads, self.log, self.lock))


def _without_slurm(env: dict[str, str]) -> dict[str, str]:
    """Lightning starts its own processes on the node's GPUs; Slurm's variables would tell it that Slurm does."""
    return {key: value for key, value in env.items() if not key.startswith(("SLURM_", "SLURMD_", "SUBMITIT_"))}


class Slurm:
    """Submits runs and watches the queue.

    Args:
        folder: The sweep's folder, on a file system that the nodes share.
        jobs: Most runs of an array at once; 0: no limit of ours.
        threads: CPU threads of each process.
        example: One of the runs, to see what a run takes.
        options: The sweep file's ``slurm``: words of submitit's SlurmExecutor, such as ``partition`` or ``time``.
        command: What is called with a run's words.
    """

    stopping = "the runs stay in the queue (scancel takes them out); start the sweep again to watch them"

    def __init__(
        self,
        folder: Path,
        jobs: int,
        threads: int,
        example: Job,
        options: dict[str, Any],
        command: Sequence[str] = TRAIN,
    ) -> None:
        self.folder, self.threads, self.command = folder.resolve(), threads, tuple(command)
        trainer = example.config.trainer
        if trainer.num_nodes > 1:
            raise UsageError(f"trainer.num_nodes: expected 1 for launcher=slurm, got {trainer.num_nodes}")
        words = {"job_name": f"chela-{folder.name}", "cpus_per_task": threads * trainer.devices, **DEFAULTS}
        if trainer.accelerator == "gpu":
            words["gpus_per_node"] = trainer.devices
        if jobs:
            words["array_parallelism"] = jobs
        self._executor = _executor(self.folder / "slurm", {**words, **options})
        self._submitted: dict[str, str] = self._read()
        self._watched: dict[str, tuple[Job, Any]] = {}
        self._missing: dict[str, int] = {}
        self._looked = 0.0
        self._queue: set[str] | None = None

    def room(self) -> int:
        """Return a number that no sweep reaches: the queue takes all."""
        return 1_000_000

    def start(self, jobs: Sequence[Job]) -> list[Job]:
        """Submit an array of the runs that are not in the queue already."""
        import submitit

        queue = self._look(force=True) or set()
        new = []
        for job in jobs:
            known = self._submitted.get(job.name)
            if known in queue:
                self._watched[job.name] = (job, submitit.SlurmJob(self._executor.folder, str(known)))
            else:
                new.append(job)
        if new:
            with self._executor.batch():
                handles = [self._executor.submit(self._training(job)) for job in new]
            for job, handle in zip(new, handles, strict=True):
                self._watched[job.name] = (job, handle)
                self._submitted[job.name] = handle.job_id
            self._write()
        return []

    def _training(self, job: Job) -> Training:
        return Training(
            self.command, job.words, self.threads, log_file(self.folder, job), self.folder / "locks" / job.name
        )

    def running(self) -> list[Job]:
        """Return what was submitted and has not ended."""
        return [job for job, _ in self._watched.values()]

    def poll(self) -> list[Ended]:
        """Collect the runs that have left their result, or have left the queue without one."""
        queue = self._look()
        ended = []
        for name, (job, handle) in list(self._watched.items()):
            gone = queue is not None and handle.job_id not in queue
            self._missing[name] = self._missing.get(name, 0) + 1 if gone else 0
            if handle.paths.result_pickle.exists() or self._missing[name] > 2:
                del self._watched[name]
                ended.append(self._ended(job, handle))
        return ended

    def _ended(self, job: Job, handle: Any) -> Ended:
        if not handle.paths.result_pickle.exists():
            return Ended(
                job, None, f"job {handle.job_id} left the queue without a result: {last_line(self.folder, job)}"
            )
        error = handle.exception()
        if error is None:
            return Ended(job, handle.result(), last_line(self.folder, job))
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

    def _read(self) -> dict[str, str]:
        path = self.folder / "slurm" / "submitted.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _write(self) -> None:
        path = self.folder / "slurm" / "submitted.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._submitted, indent=1))
        temporary.replace(path)


def _executor(folder: Path, words: dict[str, Any]) -> Any:
    try:
        import submitit
    except ImportError:
        raise UsageError("launcher=slurm: expected submitit, it is not installed: pip install 'chela[slurm]'") from None
    timeouts = words.pop("max_num_timeout", MOST_TIMEOUTS)
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=timeouts)
        executor.update_parameters(**words)
    except RuntimeError:
        raise UsageError("launcher=slurm: expected Slurm's commands on this machine, there is no srun") from None
    except (ValueError, TypeError) as error:
        raise UsageError(f"slurm: expected words of submitit's SlurmExecutor, {' '.join(str(error).split())}") from None
    return executor
