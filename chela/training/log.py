"""What is told of a run while it goes on: ``metrics.csv``, TensorBoard, Weights & Biases, the terminal."""

from __future__ import annotations

import csv
import importlib.util
import math
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from chela.config.schema import Config
from chela.config.words import duration
from chela.core.errors import UsageError
from chela.core.files import write_whole
from chela.training.objectives import Objective
from chela.training.resume import in_first
from chela.training.run import RunFolder, RunState


class Log:
    """Writes and shows a line for each logged step and each evaluation; what process 0 cannot write ends them all.

    When a run goes on from ``step``, ``metrics.csv`` is cut to that step, so that no line is lost or doubled.
    """

    def __init__(
        self, fabric: Fabric, run: RunFolder, config: Config, objective: Objective, step: int, console: Console
    ) -> None:
        self._fabric, self._run, self._config = fabric, run, config
        self.columns = ("step", "split", *objective.columns, "lr", "tokens_per_second", "seconds", "evaluation")
        self._board: TensorBoardLogger | None = None
        self._wandb: WandbLogger | None = None
        in_first(fabric, lambda: self._open(step))
        self._display = Display(console, config, objective, step)

    def _open(self, step: int) -> None:
        if self._config.wandb:
            self._wandb = open_wandb(self._run.path, self._config)
        cut_after(self._run.metrics, step, self.columns)
        if self._config.tensorboard and importlib.util.find_spec("tensorboard") is not None:
            self._board = TensorBoardLogger(self._run.path, "tensorboard", "", purge_step=step + 1)

    def line(self, step: int, split: str, values: dict[str, float], seconds: float, took: float | None = None) -> None:
        """Tell of a batch ("train") or an evaluation ("validation", or "tenth" of it) after so many steps.

        Args:
            step: Steps of the run that are done.
            split: What the values are of.
            values: The objective's columns; in training also ``lr`` and ``tokens_per_second`` (since the last line).
            seconds: Of training so far.
            took: Seconds of the evaluation; None in training.
        """
        row: dict[str, Any] = {**values, "step": step, "split": split, "seconds": round(seconds, 3)}
        if took is None:
            row["tokens_per_second"] = round(values["tokens_per_second"])
        else:
            row["evaluation"] = round(took, 3)
        in_first(self._fabric, lambda: self._write(row))
        self._display.line(step, split, values, took)

    def _write(self, row: dict[str, Any]) -> None:
        append(self._run.metrics, row, self.columns)
        scalars = {f"{row['split']}/{name}": row[name] for name in self.columns[2:-3] if name in row}
        for logger in (self._board, self._wandb):
            if logger is not None:
                logger.log_metrics(scalars, row["step"])

    def close(self) -> None:
        """Close what was opened, so that what was logged is there."""
        self._display.end()
        if self._board is not None:
            self._board.finalize("")
        if self._wandb is not None:
            self._wandb.experiment.finish()


def open_wandb(folder: Path, config: Config) -> WandbLogger:
    """Begin the run at Weights & Biases, or go on with the one that an earlier launch of this folder began.

    Raises:
        UsageError: It cannot be begun, such as without an account.
    """
    from wandb import Settings
    from wandb.errors import Error

    name = folder / "wandb" / "id"
    if not name.exists():
        name.parent.mkdir(exist_ok=True)
        write_whole(name, uuid.uuid4().hex.encode())
    settings = Settings(console="off")  # the display of this run is not theirs to catch
    logger = WandbLogger(
        f"{folder.parent.name}/{folder.name}", folder, id=name.read_text(), project="chela", settings=settings
    )
    try:
        logger.log_hyperparams(asdict(config))
    except Error as error:
        raise UsageError(f"wandb=true: expected to begin a run, got: {error}; see WANDB_MODE=offline") from None
    return logger


def append(path: Path, row: dict[str, Any], columns: Sequence[str]) -> None:
    """Add one line to a metrics file, its heading first when the file is new."""
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


def cut_after(path: Path, step: int, columns: Sequence[str]) -> None:
    """Drop the lines of a metrics file that are later than ``step``, and those that this package did not write.

    A power cut leaves a torn last line, or zeros in its place; a person's editor may leave an empty one.
    """
    if not path.exists():
        return
    whole = re.compile(rf"[0-9]+(,[^,\0]*){{{len(columns) - 1}}}\n")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if whole.match(line) and int(line.partition(",")[0]) <= step]
    write_whole(path, "".join([",".join(columns) + "\n", *kept]).encode())


class Display:
    """Shows score, loss, learning rate, tokens/s and the time left: a live line in a terminal, else plain lines."""

    ESTIMATE_AFTER = 20  # steps
    SMOOTH = 0.6  # of the running averages shown, from line to line
    LINES = 20  # of a run, where nothing is live

    def __init__(self, console: Console, config: Config, objective: Objective, step: int) -> None:
        self.mode = "none" if console.quiet else config.trainer.progress
        if self.mode == "auto":
            self.mode = "live" if console.is_terminal else "plain"
        self.console, self._score, self._total = console, objective.score, config.trainer.max_steps
        self.smooth: dict[str, float] = {}
        self._start, self._first, self._said, self._estimated = time.monotonic(), step, step, False
        self._bar: Progress | None = None
        if self.mode == "live":
            text = TextColumn("{task.description}")
            columns = (MofNCompleteColumn(), BarColumn(bar_width=20), text, TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=self._total, completed=step)
            self._bar.start()

    def line(self, step: int, split: str, values: dict[str, float], took: float | None) -> None:
        """Show a line of the log."""
        if self.mode == "none":
            return
        if took is None:
            self._training(step, values)
            return
        score = "" if self._score.name == "loss" else f"  {self._score.text(values)}"
        what = "validation" if split == "validation" else "a tenth of validation"
        self.console.print(f"step {step}: {what} loss {values['loss']:.4f}{score}  ({duration(took)})")

    def _training(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.smooth[name] = self.SMOOTH * self.smooth.get(name, value) + (1 - self.SMOOTH) * value
        rate = (time.monotonic() - self._start) / max(1, step - self._first)
        if not self._estimated and step >= self._first + self.ESTIMATE_AFTER and step < self._total:
            self._estimated = True
            left = duration(rate * (self._total - self._first))
            self.console.print(f"after {step - self._first} steps: about {left} for the {self._total} steps")
        shown = f"loss {self.smooth['loss']:.3f}  accuracy {self.smooth['accuracy']:.1%}"
        text = f"{shown}  lr {values['lr']:.2e}  {self.smooth['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif step - self._said >= self._total / self.LINES or step == self._total:
            self._said = step
            left = duration(rate * (self._total - step))
            self.console.print(f"step {step}/{self._total}  {text}  {left} left")

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


def data_progress(console: Console, every: float = 5.0) -> Callable[[str, int, int], None]:
    """Return what says how far the making of records is, every so many seconds."""
    said = time.monotonic()

    def say(what: str, done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > every:
            said = time.monotonic()
            console.print(f"{what}: {done:,} of {total:,}")

    return say


class ChanceWatch:
    """Warns once when training is still at the majority class; remembers whether it ever left it.

    It has left it when its accuracy over a window of ``trainer.chance_steps`` is more than one point above the majority
    class's share, and more than three standard errors, which are more than a point where the window is short.

    Args:
        state: Keeps what was found, and where the window began.
        majority: Share of the most frequent class in the training set.
        say: Prints a line.
    """

    POINT = 0.01

    def __init__(self, state: RunState, majority: float, say: Callable[[str], object]) -> None:
        self.state, self.majority, self.say = state, majority, say

    def after_step(self, config: Config, totals: Callable[[], list[float]]) -> None:
        """Judge where a window after the warm-up ends, by the run's totals; only there is a GPU waited for."""
        steps, whole = self.state.step - config.optimizer.warmup_steps, config.trainer.chance_steps
        ends = steps % whole == 0 or self.state.step == config.trainer.max_steps
        if self.state.learned or steps < 0 or not ends:
            return
        correct, targets, _ = totals()
        if steps:
            self.judge(correct, targets, steps % whole or whole, whole)
        self.state.window = [correct, targets]

    def judge(self, correct: float, targets: float, steps: int, whole: int) -> None:
        """Judge by the targets hit, and the targets, since the first step, after ``steps`` of a ``whole`` window.

        Less than half of a window may show that something was learned, not that nothing was.
        """
        correct, targets = correct - self.state.window[0], targets - self.state.window[1]
        if not targets:
            return
        accuracy = correct / targets
        error = math.sqrt(self.majority * (1 - self.majority) / targets)
        if accuracy > self.majority + max(self.POINT, 3 * error):
            self.state.learned = True
        elif 2 * steps >= whole:
            self.state.learned = False
        if self.state.learned is False and not self.state.warned and steps == whole:
            self.state.warned = True
            self.say(
                f"warning: after the warm-up and {whole} steps the training accuracy is {accuracy:.1%}, within a "
                f"point of the majority class ({self.majority:.1%}). Usual causes: a learning rate too high or too "
                "low, a warm-up too short, the norm (try model.norm=batch), a kernel or decay that reaches too short, "
                "or too few steps yet"
            )
