"""What a person sees of a sweep: a live table in a terminal, a line for each event elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from experiments.plan import Job

MOST_ROWS = 24  # of runs shown at once


class Board:
    """Counts and shows what is done, what runs and until when, and what failed.

    Args:
        folder: The sweep's folder.
        console: Where to print; standard output if not given.
    """

    def __init__(self, folder: Path, console: Console | None = None) -> None:
        self.folder = folder
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._live = Live(console=self.console, refresh_per_second=2) if self.console.is_terminal else None
        self._total = self._skipped = self._finished = 0
        self._started: dict[str, tuple[float, int]] = {}
        self._failed: dict[str, str] = {}
        self._blocked: dict[str, str] = {}
        self._rates: list[float] = []  # seconds that finished runs took, of this launch
        self._drawn = 0.0

    def __enter__(self) -> Board:
        """Begin the live table."""
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """End it; its last state stays on the screen."""
        if self._live:
            self._live.stop()

    def plain(self, line: str) -> None:
        """Print a line."""
        self.console.print(line)

    def say(self, line: str) -> None:
        """Print a line with the time of day."""
        self.console.print(f"{time.strftime('%H:%M:%S')}  {line}")

    # ---- events ----

    def known(self, jobs: Sequence[Job], finished: Sequence[Job]) -> None:
        """Count runs that have come to be known, and those of them that were finished before."""
        self._total += len(jobs)
        self._skipped += len(finished)

    def started(self, jobs: Sequence[Job]) -> None:
        """Note runs that have just been started."""
        for job in jobs:
            step = job.step()
            self._started[job.name] = (time.monotonic(), step)
            self.say(f"{job.name}: {f'goes on from step {step}' if step else 'started'}")

    def finished(self, job: Job, how: str = "finished") -> None:
        """Note a run that is done."""
        self._finished += 1
        if job.name in self._started:
            self._rates.append(time.monotonic() - self._started[job.name][0])
        self.say(f"{job.name}: {how} ({self._skipped + self._finished}/{self._total})")

    def stopped(self, job: Job) -> None:
        """Note a run that was stopped and can go on."""
        self.say(f"{job.name}: stopped at step {job.step()} of {job.config.trainer.max_steps}")

    def failed(self, job: Job, line: str) -> None:
        """Note a run that failed."""
        self._failed[job.name] = line
        self.say(f"{job.name}: FAILED, the others go on: {line}")

    def blocked(self, name: str, reason: str) -> None:
        """Note a system whose seeds cannot be run."""
        self._blocked[name] = reason
        self.say(f"{name}: {reason}")

    # ---- the table ----

    def show(self, running: Sequence[Job], waiting: int, undecided: int) -> None:
        """Draw the table again, at most once a second."""
        if self._live is None or time.monotonic() - self._drawn < 1:
            return
        self._drawn = time.monotonic()
        table = Table(title=self._headline(running, waiting, undecided), title_justify="left", box=None, padding=(0, 2))
        for column in ("run", "step", "left"):
            table.add_column(column, justify="left" if column == "run" else "right")
        for job in running[:MOST_ROWS]:
            step, total = job.step(), job.config.trainer.max_steps
            table.add_row(job.name, f"{step}/{total}", duration(self._left(job, step, total)))
        for name, line in self._failed.items():
            table.add_row(name, "failed", line[:60])
        self._live.update(table)

    def _headline(self, running: Sequence[Job], waiting: int, undecided: int) -> str:
        words = [
            f"{self._skipped + self._finished}/{self._total} done",
            f"{len(running)} running",
            f"{waiting} waiting",
        ]
        if self._failed:
            words.append(f"{len(self._failed)} failed")
        if undecided:
            words.append(f"{undecided} systems without a learning rate yet")
        if self._rates and running:
            mean = sum(self._rates) / len(self._rates)
            words.append(f"about {duration(mean * (waiting + 0.5 * len(running)) / len(running))} left")
        return ", ".join(words)

    def _left(self, job: Job, step: int, total: int) -> float | None:
        began, first = self._started.get(job.name, (time.monotonic(), step))
        return (time.monotonic() - began) / (step - first) * (total - step) if step > first else None

    def summary(self) -> None:
        """Say how it ended and what to do next."""
        done = self._skipped + self._finished
        self.plain(
            f"{done} of {self._total} runs finished ({self._skipped} of them before), {len(self._failed)} failed"
        )
        for name, line in self._failed.items():
            self.plain(f"  failed: {name}: {line} (log: {self.folder / 'logs' / name}.log)")
        for name, reason in self._blocked.items():
            self.plain(f"  not run: {name}: {reason}")
        if done < self._total or self._blocked:
            self.plain("to go on: start the same command again")
        if done:
            self.plain(f"table: python -m experiments.table {self.folder}")


def duration(seconds: float | None) -> str:
    """Return a time in words.

    >>> duration(3700)
    '1 h 01 min'
    """
    if seconds is None:
        return "…"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
