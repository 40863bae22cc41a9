"""What is written down while a run goes on: ``metrics.csv``, TensorBoard, Weights & Biases; the watch for chance."""

from __future__ import annotations

import csv
import importlib.util
import math
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning as L
from lightning.pytorch.loggers import WandbLogger

from chela.core.errors import UsageError
from chela.core.files import write_whole
from chela.schema import Config
from chela.training.module import LitModel, StepCallback
from chela.training.run import RunFolder, RunState
from chela.training.stopping import in_first


@dataclass(frozen=True)
class Line:
    """What there is to say of a step: of its batch, or of a validation after it.

    Attributes:
        step: Steps of the run that are done.
        split: "train", "validation", or "tenth" of a fixed tenth of that.
        values: The objective's columns; in training also ``lr`` and ``tokens_per_second`` (since the last line).
        seconds: Of training so far.
        took: Seconds of the evaluation; None in training.
    """

    step: int
    split: str
    values: dict[str, float]
    seconds: float
    took: float | None = None


class Listener(Protocol):
    """Gets every line, in all processes; ``end`` is called however the launch ends, and perhaps twice."""

    def begin(self, trainer: L.Trainer, module: LitModel) -> None: ...  # noqa: D102
    def line(self, trainer: L.Trainer, line: Line) -> None: ...  # noqa: D102
    def end(self) -> None: ...  # noqa: D102


class Reporter(StepCallback):
    """Make a line of each logged step and validation, hand it to the listeners, and keep the watch for chance.

    A GPU is waited for only at a logged step, and where a window of the watch ends.

    Args:
        state: Gets the seconds of training.
        listeners: Get the lines.
        watch: Looks at the targets hit.
    """

    def __init__(self, state: RunState, listeners: Sequence[Listener], watch: ChanceWatch) -> None:
        self.state, self.listeners, self.watch = state, listeners, watch
        self._tokens = 0.0  # of the run, at the last line

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        module: LitModel = pl_module
        for listener in self.listeners:
            listener.begin(trainer, module)
        self._tokens = self.state.totals[2]
        self._seconds, self._clock = self.state.seconds, time.monotonic()

    def on_step_end(self, trainer: L.Trainer, module: LitModel) -> None:
        """Make a line when one is due."""
        now = time.monotonic()
        self.state.seconds += now - self._clock
        self._clock = now
        config = module.config.trainer
        if module.step % config.log_every == 0 or module.step == config.max_steps:
            module.expect_finite()
            values = module.objective.values(module.of_step.compute())
            tokens, elapsed = module.of_run.compute()["tokens"], self.state.seconds - self._seconds
            values["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            values["tokens_per_second"] = (tokens - self._tokens) / max(elapsed, 1e-9)
            self._tokens, self._seconds = tokens, self.state.seconds
            self._hand_out(trainer, Line(module.step, "train", values, self.state.seconds))
        self.watch.after_step(module)
        every = config.tenth_every
        if every and module.step % every == 0 and (config.max_steps - module.step) % config.val_every:
            self.on_validation_start(trainer, module)
            self._evaluated(trainer, module, "tenth", module.score_tenth())

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the clock."""
        self._evaluating = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Make the validation's line; its time does not count as training."""
        module: LitModel = pl_module
        self._evaluated(trainer, module, "validation", module.evaluated)

    def _evaluated(self, trainer: L.Trainer, module: LitModel, split: str, values: dict[str, float]) -> None:
        took = time.monotonic() - self._evaluating
        self.state.evaluation_seconds += took
        self._hand_out(trainer, Line(module.step, split, values, self.state.seconds, took))
        self._clock = time.monotonic()

    def _hand_out(self, trainer: L.Trainer, line: Line) -> None:
        for listener in self.listeners:
            listener.line(trainer, line)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the listeners close what they opened."""
        for listener in self.listeners:
            listener.end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close also when the run is stopped, so that what was logged is there."""
        self.on_fit_end(trainer, pl_module)


class MetricsLog:
    """Writes ``metrics.csv``, and to TensorBoard and Weights & Biases where the configuration says so.

    The file is appended to when a run goes on, after it has been cut to the checkpoint's step, so that no line is lost
    or doubled. The first process writes; what it cannot write ends them all.

    Args:
        run: Gives the run's folder, once it is known to all processes.
        config: Says where to write.
    """

    def __init__(self, run: Callable[[], RunFolder], config: Config) -> None:
        self._run, self.config = run, config
        self._board: Any = None
        self._wandb: WandbLogger | None = None
        self._use_board = config.tensorboard and importlib.util.find_spec("tensorboard") is not None

    def begin(self, trainer: L.Trainer, module: LitModel) -> None:
        """Open the file, cut to the step from which this launch goes on."""
        self.columns = ("step", "split", *module.objective.columns, "lr", "tokens_per_second", "seconds", "evaluation")
        in_first(trainer, lambda: self._open(module.first_step))

    def _open(self, first_step: int) -> None:
        run = self._run()
        if self.config.wandb:
            self._wandb = open_wandb(run.path, self.config)
        cut_after(run.metrics, first_step, self.columns)
        if self._use_board:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run.path / "tensorboard"), purge_step=first_step + 1)  # type: ignore[no-untyped-call]

    def line(self, trainer: L.Trainer, line: Line) -> None:
        """Write a line."""
        in_first(trainer, lambda: self._write(line))

    def _write(self, line: Line) -> None:
        row: dict[str, Any] = {**line.values, "step": line.step, "split": line.split}
        row["seconds"] = round(line.seconds, 3)
        if line.took is not None:
            row["evaluation"] = round(line.took, 3)
        if "tokens_per_second" in row:
            row["tokens_per_second"] = round(row["tokens_per_second"])
        append(self._run().metrics, row, self.columns)
        scalars = {f"{line.split}/{name}": line.values[name] for name in self.columns[2:-3] if name in line.values}
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, line.step)
        if self._wandb is not None:
            self._wandb.log_metrics(scalars, line.step)

    def end(self) -> None:
        """Close TensorBoard and Weights & Biases."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.experiment.finish()
        self._board = self._wandb = None


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

    def after_step(self, module: LitModel) -> None:
        """Judge where a window after the warm-up ends."""
        config, steps = module.config.trainer, module.step - module.config.optimizer.warmup_steps
        if self.state.learned or steps < 0:
            return
        if steps % config.chance_steps == 0 or module.step == config.max_steps:
            totals = module.of_run.compute()
            if steps:
                whole = config.chance_steps
                self.judge(totals["correct"], totals["targets"], steps % whole or whole, whole)
            self.state.window = [totals["correct"], totals["targets"]]

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


def append(path: Path, row: dict[str, Any], columns: Sequence[str]) -> None:
    """Add one line to a metrics file, its heading first when the file is new."""
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


def cut_after(path: Path, step: int, columns: Sequence[str]) -> None:
    """Drop the lines of a metrics file that are later than ``step``, and those that are none of ours.

    A power cut leaves a torn last line, or zeros in its place; a person's editor may leave an empty one. A file of
    version 0.1 has no last column yet.
    """
    if not path.exists():
        return
    whole = re.compile(rf"[0-9]+(,[^,\0]*){{{len(columns) - 1}}}\n")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and lines[0] == ",".join(columns[:-1]) + "\n":
        lines = [line.removesuffix("\n") + ",\n" if line.endswith("\n") else line for line in lines]
    kept = [line for line in lines if whole.match(line) and int(line.partition(",")[0]) <= step]
    write_whole(path, "".join([",".join(columns) + "\n", *kept]).encode())
