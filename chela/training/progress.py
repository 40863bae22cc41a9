"""What a person sees while a run goes on: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from chela.config import duration
from chela.training.metrics import Line
from chela.training.module import LitModel

ESTIMATE_AFTER = 20  # steps
SMOOTH = 0.6  # of the running averages shown, from line to line
LINES = 20  # of a run, where nothing is live


class Display:
    """Shows score, loss, learning rate, tokens/s and the time left; a listener of the ``Reporter``.

    Args:
        console: Where to print; silent in all processes but the first.
        mode: "live", "plain" or "none".
    """

    def __init__(self, console: Console, mode: str) -> None:
        self.console, self.mode = console, mode
        self.smooth: dict[str, float] = {}
        self._bar: Progress | None = None

    def begin(self, trainer: L.Trainer, module: LitModel) -> None:
        """Start the clock, and the bar."""
        self._start, self._first, self._said = time.monotonic(), module.step, module.step
        self._total = module.config.trainer.max_steps
        self._score, self._estimated = module.objective.score, False
        if self.mode == "live" and trainer.is_global_zero:
            text = TextColumn("{task.description}")
            columns = (MofNCompleteColumn(), BarColumn(bar_width=20), text, TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=self._total, completed=self._first)
            self._bar.start()

    def line(self, trainer: L.Trainer, line: Line) -> None:
        """Show a line."""
        if self.mode == "none" or not trainer.is_global_zero:
            return
        if line.took is not None:
            loss = f"loss {line.values['loss']:.4f}"
            score = "" if self._score.name == "loss" else f"  {self._score.text(line.values)}"
            what = "validation" if line.split == "validation" else "a tenth of validation"
            self.console.print(f"step {line.step}: {what} {loss}{score}  ({duration(line.took)})")
        else:
            self._show(line)

    def _show(self, line: Line) -> None:
        for name, value in line.values.items():
            self.smooth[name] = SMOOTH * self.smooth.get(name, value) + (1 - SMOOTH) * value
        rate = (time.monotonic() - self._start) / max(1, line.step - self._first)
        if not self._estimated and line.step >= self._first + ESTIMATE_AFTER and line.step < self._total:
            self._estimated = True
            left = duration(rate * (self._total - self._first))
            self.console.print(f"after {line.step - self._first} steps: about {left} for the {self._total} steps")
        shown = f"loss {self.smooth['loss']:.3f}  accuracy {self.smooth['accuracy']:.1%}"
        text = f"{shown}  lr {line.values['lr']:.2e}  {self.smooth['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=line.step, description=text)
        elif line.step - self._said >= self._total / LINES or line.step == self._total:
            self._said = line.step
            left = duration(rate * (self._total - line.step))
            self.console.print(f"step {line.step}/{self._total}  {text}  {left} left")

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class DataProgress:
    """Say how far the making of records is, when it takes more than a moment.

    Args:
        console: Where to print.
    """

    EVERY = 5.0  # seconds

    def __init__(self, console: Console) -> None:
        self.console = console
        self._said = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say it, but not too often."""
        if time.monotonic() - self._said > self.EVERY:
            self._said = time.monotonic()
            self.console.print(f"{what}: {done:,} of {total:,}")
