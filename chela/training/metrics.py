"""What is written down while a run goes on: ``metrics.csv``, TensorBoard, Weights & Biases; the watch for chance."""

from __future__ import annotations

import importlib.util
import math
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger

from chela.config import to_dict
from chela.errors import UsageError
from chela.schema import Config
from chela.training.checkpoint import write_whole
from chela.training.keeping import Keeper
from chela.training.module import LitClassifier
from chela.training.processes import in_first
from chela.training.steps import StepCallback

COLUMNS = ("step", "split", "loss", "accuracy", "lr", "tokens_per_second", "seconds")
HEADING = ",".join(COLUMNS) + "\n"
_LINE = re.compile(rf"[0-9]+(,[^,\0]*){{{len(COLUMNS) - 1}}}\n")


class Metrics(StepCallback):
    """A line in ``metrics.csv`` for each logged step and validation.

    The file is appended to when a run goes on, after it has been cut to the checkpoint's step, so that no line is lost
    or doubled. ``loss`` and ``accuracy`` of a training line are those of that step's batch.

    Args:
        keeper: Knows the run folder and the first step of this launch.
        config: Says whether to write to TensorBoard, when it is installed, and to Weights & Biases too.
    """

    def __init__(self, keeper: Keeper, config: Config) -> None:
        self.keeper, self.config = keeper, config
        self.tokens = 0
        self.seconds = 0.0
        self.latest: dict[str, float] = {}
        self.correct = self.count = 0
        self._board: Any = None
        self._wandb: WandbLogger | None = None
        self._use_board = config.tensorboard and importlib.util.find_spec("tensorboard") is not None

    def state_dict(self) -> dict[str, Any]:
        """Return the tokens and seconds of training so far."""
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from there."""
        self.tokens, self.seconds = state["tokens"], state["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the file, cut to the step from which this launch goes on."""
        in_first(trainer, self._open)
        self._clock = time.monotonic()

    def _open(self) -> None:
        run = self.keeper.run
        if self.config.wandb:
            self._wandb = open_wandb(run.path, self.config)
        cut_after(run.metrics, self.keeper.first_step)
        if self._use_board:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(run.path / "tensorboard")
            self._board = SummaryWriter(folder, purge_step=self.keeper.first_step + 1)  # type: ignore[no-untyped-call]

    def on_step_end(self, trainer: L.Trainer, module: LitClassifier) -> None:
        """Count, and write a line when one is due."""
        now = time.monotonic()
        elapsed, self._clock = now - self._clock, now
        tokens, self.correct, self.count, loss = _summed(trainer, module)
        self.tokens += tokens
        self.seconds += elapsed
        self.latest = {
            "loss": loss,
            "accuracy": self.correct / self.count,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "tokens_per_second": tokens / max(elapsed, 1e-9),
        }
        config = module.config.trainer
        if trainer.global_step % config.log_every == 0 or trainer.global_step == config.max_steps:
            self._write(trainer, "train", self.latest)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the validation's line; its time does not count as training."""
        assert isinstance(pl_module, LitClassifier)
        self._write(trainer, "validation", pl_module.evaluated)
        self._clock = time.monotonic()

    def _write(self, trainer: L.Trainer, split: str, values: dict[str, float]) -> None:
        in_first(trainer, lambda: self._write_line(trainer.global_step, split, values))

    def _write_line(self, step: int, split: str, values: dict[str, float]) -> None:
        row = {**values, "step": step, "split": split, "seconds": round(self.seconds, 3)}
        row["tokens_per_second"] = round(values["tokens_per_second"]) if split == "train" else ""
        append(self.keeper.run.metrics, row)
        scalars = {f"{split}/{name}": values[name] for name in ("loss", "accuracy", "lr") if name in values}
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log_metrics(scalars, step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close TensorBoard and Weights & Biases."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close them also when the run is stopped, so that what it logged is there."""
        self._close()

    def _close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.experiment.finish()
        self._board = self._wandb = None  # closed once: an exception may come later, in the test


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
        logger.log_hyperparams(to_dict(config))
    except Error as error:
        raise UsageError(f"wandb=true: expected to begin a run, got: {error}; see WANDB_MODE=offline") from None
    return logger


class ChanceWatch(StepCallback):
    """Warn once when training is still at the majority class; remember whether it ever left it.

    It has left it when its accuracy over a window of steps is more than one point above the majority class's share, and
    more than three standard errors, which are more than a point where a run is so short that its window is too.

    Args:
        metrics: Holds the counts of the latest step; it stands before this callback.
        majority: Share of the most frequent class in the training set.
        say: Prints a line.
    """

    POINT = 0.01

    def __init__(self, metrics: Metrics, majority: float, say: Callable[[str], object]) -> None:
        self.metrics, self.majority, self.say = metrics, majority, say
        self.correct = self.count = self.steps = 0
        self.learned = self.warned = False

    def state_dict(self) -> dict[str, Any]:
        """Return what has been counted."""
        return {name: getattr(self, name) for name in ("correct", "count", "steps", "learned", "warned")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        for name, value in state.items():
            setattr(self, name, value)

    def on_step_end(self, trainer: L.Trainer, module: LitClassifier) -> None:
        """Count the steps after the warm-up, in windows of ``trainer.chance_steps``."""
        config = module.config
        if self.learned or trainer.global_step <= config.optimizer.warmup_steps:
            return
        self.correct += self.metrics.correct
        self.count += self.metrics.count
        self.steps += 1
        if self.steps >= config.trainer.chance_steps or trainer.global_step == config.trainer.max_steps:
            self._judge(config.trainer.chance_steps)

    def _judge(self, window: int) -> None:
        accuracy = self.correct / self.count
        error = math.sqrt(self.majority * (1 - self.majority) / self.count)
        self.learned = accuracy > self.majority + max(self.POINT, 3 * error)
        if not self.learned and not self.warned and self.steps >= window:
            self.warned = True
            self.say(
                f"warning: after the warm-up and {window} steps the training accuracy is {accuracy:.1%}, within a "
                f"point of the majority class ({self.majority:.1%}). Usual causes: a learning rate too high or too "
                "low, a warm-up too short, the norm (try model.norm=batch), a kernel or decay that reaches too short, "
                "or too few steps yet"
            )
        self.correct = self.count = self.steps = 0


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one line to a metrics file, its heading first when the file is new."""
    with open(path, "a", encoding="utf-8") as file:
        line = ",".join(_cell(row.get(name, "")) for name in COLUMNS) + "\n"
        file.write(line if file.tell() else HEADING + line)


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of a metrics file that are later than ``step``, and those that are none of ours.

    A power cut leaves a torn last line, or zeros in its place; a person's editor may leave an empty one.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _LINE.match(line) and int(line.partition(",")[0]) <= step]
    write_whole(path, "".join([HEADING, *kept]).encode())


def _cell(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _summed(trainer: L.Trainer, module: LitClassifier) -> tuple[int, int, int, float]:
    """Return tokens, correct, count and mean loss of the step, over all processes."""
    assert module.counts is not None
    row = module.counts.clone()
    if trainer.world_size > 1:
        torch.distributed.all_reduce(row)
    tokens, correct, number, loss = row.tolist()  # one wait for the GPU, not four
    return int(tokens), int(correct), int(number), loss / number
