"""The logs of a run: ``metrics.csv``, TensorBoard, Weights & Biases, the terminal."""

from __future__ import annotations

import csv
import importlib.util
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.status import Status

from chela.config.schema import Config
from chela.core.errors import UsageError
from chela.core.files import write_whole
from chela.training.objectives import Objective
from chela.training.resume import on_rank_zero
from chela.training.run import RunFolder


class Log:
    """Writes and shows a line for each logged step and evaluation; a line that cannot be written ends all processes.

    In a terminal each line of training replaces the last, elsewhere some of them are printed. When a run goes on from
    ``step``, ``metrics.csv`` is cut to that step, so that no line is lost or doubled.
    """

    LINES = 20  # of training that are printed

    def __init__(
        self, fabric: Fabric, run: RunFolder, config: Config, objective: Objective, step: int, console: Console
    ) -> None:
        self._fabric, self._run, self._config, self._console = fabric, run, config, console
        self._score, self._loggers = objective.score, list[TensorBoardLogger | WandbLogger]()
        self.columns = ("step", "split", *objective.columns, "lr", "tokens_per_second", "seconds", "evaluation")
        on_rank_zero(fabric, lambda: self._open(step))
        self._start, self._first, self._said = time.monotonic(), step, step
        self._live = console.is_terminal and not console.quiet and config.trainer.progress == "auto"
        self._status = Status("", console=console)
        if self._live:
            self._status.start()

    def _open(self, step: int) -> None:
        if self._config.wandb:
            self._loggers.append(open_wandb(self._run.path, self._config))
        cut_after(self._run.metrics, step, self.columns)
        if self._config.tensorboard and importlib.util.find_spec("tensorboard") is not None:
            self._loggers.append(TensorBoardLogger(self._run.path, "tensorboard", "", purge_step=step + 1))

    def line(self, step: int, split: str, values: dict[str, float], seconds: float, took: float | None = None) -> None:
        """Log a batch ("train") or an evaluation ("validation") after so many steps.

        ``values`` are the objective's columns, in training also ``lr`` and ``tokens_per_second`` since the last line;
        ``seconds`` those of training so far, ``took`` those of the evaluation.
        """
        row: dict[str, Any] = {**values, "step": step, "split": split, "seconds": round(seconds, 3)}
        if took is None:
            row["tokens_per_second"] = round(values["tokens_per_second"])
        else:
            row["evaluation"] = round(took, 3)
        on_rank_zero(self._fabric, lambda: self._write(row))
        if self._config.trainer.progress != "none":
            self._show(step, values, took)

    def _write(self, row: dict[str, Any]) -> None:
        append(self._run.metrics, row, self.columns)
        other = ("step", "split", "tokens_per_second", "seconds", "evaluation")
        scalars = {f"{row['split']}/{name}": row[name] for name in self.columns if name in row and name not in other}
        for logger in self._loggers:
            logger.log_metrics(scalars, row["step"])

    def _show(self, step: int, values: dict[str, float], took: float | None) -> None:
        total = self._config.trainer.max_steps
        if took is not None:
            score = "" if self._score.name == "loss" else f"  {self._score.text(values)}"
            self._console.print(f"step {step}: validation loss {values['loss']:.4f}{score}  ({took:.0f} s)")
        elif self._live or step - self._said >= total / self.LINES or step == total:
            self._said = step
            left = timedelta(seconds=round((time.monotonic() - self._start) / (step - self._first) * (total - step)))
            text = f"step {step}/{total}  {left} left  loss {values['loss']:.3f}  accuracy {values['accuracy']:.1%}  "
            text += f"{values['tokens_per_second']:,.0f} tokens/s  lr {values['lr']:.2e}"
            show = self._status.update if self._live else self._console.print
            show(text)

    def close(self) -> None:
        """Close what was opened, and write out what was logged."""
        self._status.stop()
        for logger in self._loggers:
            logger.finalize("success")
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()


def open_wandb(folder: Path, config: Config) -> WandbLogger:
    """Begin the run at Weights & Biases, or go on with the one that an earlier launch of this folder began."""
    from wandb import Settings
    from wandb.errors import Error

    mark = folder / "wandb" / "id"
    if not mark.exists():
        mark.parent.mkdir(exist_ok=True)
        write_whole(mark, uuid.uuid4().hex.encode())
    settings = Settings(console="off")  # leave this run's terminal alone
    name = f"{folder.parent.name}/{folder.name}"
    logger = WandbLogger(name, folder, id=mark.read_text(), project="chela", settings=settings)
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
