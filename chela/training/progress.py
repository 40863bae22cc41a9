"""What a person sees while a run goes on: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from chela.training.metrics import Metrics
from chela.training.module import LitClassifier
from chela.training.steps import StepCallback

ESTIMATE_AFTER = 20  # steps
SMOOTH = 0.95  # of the running averages shown


class ProgressDisplay(StepCallback):
    """Loss, accuracy, learning rate, tokens/s and time left.

    Args:
        console: Where to print.
        metrics: Holds the latest values; it stands before this callback.
        mode: "live", "plain" or "none".
    """

    def __init__(self, console: Console, metrics: Metrics, mode: str) -> None:
        self.console, self.metrics, self.mode = console, metrics, mode
        self.smooth: dict[str, float] = {}
        self._bar: Progress | None = None
        self._steps = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and the bar."""
        self._start, self._first = time.monotonic(), trainer.global_step
        if self.mode == "live" and trainer.is_global_zero:
            self._bar = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            total = _max_steps(pl_module)
            self._task = self._bar.add_task("", total=total, completed=self._first)
            self._bar.start()

    def on_step_end(self, trainer: L.Trainer, module: LitClassifier) -> None:
        """Show the step."""
        if not trainer.is_global_zero or self.mode == "none":
            return
        self._steps += 1
        for name, value in self.metrics.latest.items():
            kept = min(SMOOTH, 1 - 1 / self._steps)  # a plain mean at first
            self.smooth[name] = kept * self.smooth.get(name, 0.0) + (1 - kept) * value
        step, total = trainer.global_step, module.config.trainer.max_steps
        rate = (time.monotonic() - self._start) / self._steps
        if self._steps == ESTIMATE_AFTER and total > step:
            self.console.print(
                f"after {ESTIMATE_AFTER} steps: about {_duration(rate * (total - self._first))} for the {total} steps"
            )
        line = (
            f"loss {self.smooth['loss']:.3f}  accuracy {self.smooth['accuracy']:.1%}  "
            f"lr {self.metrics.latest['lr']:.2e}  {self.smooth['tokens_per_second']:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=line)
        elif step % max(1, total // 20) == 0 or step == total:
            self.console.print(f"step {step}/{total}  {line}  {_duration(rate * (total - step))} left")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how the validation came out."""
        if trainer.is_global_zero and self.mode != "none":
            assert isinstance(pl_module, LitClassifier)
            found = pl_module.evaluated
            self.console.print(
                f"step {trainer.global_step}: validation loss {found['loss']:.4f}  accuracy {found['accuracy']:.2%}"
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the bar away."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the bar away."""
        self._stop()

    def _stop(self) -> None:
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


def _max_steps(module: L.LightningModule) -> int:
    assert isinstance(module, LitClassifier)
    return module.config.trainer.max_steps


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
