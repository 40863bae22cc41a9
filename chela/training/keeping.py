"""Saving, stopping and going on: a run that is cut into pieces ends where an uncut one does.

Lightning's own resume changes the data order and its timer is restored with the run, so neither is used. A launch is
a fresh fit whose step counters start where the last one stopped; data order, dropout and learning rate follow from the
step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L
import torch

from chela.config import seconds, to_dict
from chela.training import checkpoint
from chela.training.module import LitClassifier
from chela.training.run import RunFolder


class Stopped(Exception):
    """The run was stopped at a step and saved."""

    def __init__(self, step: int, reason: str, status: int) -> None:
        super().__init__(f"stopped at step {step} ({reason})")
        self.step, self.reason, self.status = step, reason, status


class Keeper(L.Callback):
    """Restore at the start, save on the way, stop when asked to.

    A checkpoint is only taken when everything that belongs to its step has been done, the validation included.

    Args:
        run: The run folder, as process 0 knows it.
        goes_on: Start from the newest checkpoint.
        say: Prints a line.
        parts: Other callbacks whose ``state_dict`` belongs to the checkpoint, by name.
    """

    def __init__(self, run: RunFolder, goes_on: bool, say: Callable[[str], object], parts: dict[str, Any]) -> None:
        self.run, self.goes_on, self.say, self.parts = run, goes_on, say, parts
        self.best: dict[str, Any] | None = None
        self.latest: dict[str, Any] = {}
        self.first_step = 0
        self.earlier_seconds = 0.0
        self._asked: tuple[str, int] | None = None
        self._started = time.monotonic()
        self._saved_at = (0, time.monotonic())
        self._handlers: dict[int, Any] = {}

    # ---- start ----

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Agree on the folder: only process 0 knows it."""
        path, self.goes_on = trainer.strategy.broadcast((self.run.path, self.goes_on))
        self.run = RunFolder(path)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put weights, optimiser and step counters where the last launch left them."""
        self._catch_signals()
        state = self.run.load_last(self.say) if self.goes_on else None
        if state is not None:
            self._restore(trainer, _module(pl_module), state)
        config = _module(pl_module).config.trainer
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = self.first_step
        # Lightning validates at multiples of val_every in this count; shifted so that the last step is one of them
        shifted = self.first_step + -config.max_steps % config.val_every
        loop.batch_progress.total.ready = loop.batch_progress.total.completed = shifted
        trainer.datamodule.first_step = self.first_step  # type: ignore[attr-defined]

    def _restore(self, trainer: L.Trainer, module: LitClassifier, state: dict[str, Any]) -> None:
        module.model.load_state_dict(state["model"])
        trainer.optimizers[0].load_state_dict(state["optimizer"])
        self.best, self.latest, self.first_step = state["best"], state["latest"], state["step"]
        self.earlier_seconds = state["wall_seconds"]
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self._saved_at = (self.first_step, time.monotonic())

    def _catch_signals(self) -> None:
        def ask(number: int, frame: FrameType | None) -> None:
            self._asked = (signal.Signals(number).name, 128 + number)

        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers.setdefault(number, signal.signal(number, ask))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    # ---- on the way ----

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save or stop, unless this step's validation is still to come."""
        config = _module(pl_module).config.trainer
        if (config.max_steps - trainer.global_step) % config.val_every:
            self._end_of_step(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the weights when they are the best so far, then save or stop."""
        module = _module(pl_module)
        accuracy = module.evaluated["accuracy"]
        self.latest = {"accuracy": accuracy, "step": trainer.global_step}
        if self.best is None or accuracy > self.best["accuracy"]:
            weights = {name: value.detach().cpu().clone() for name, value in module.model.state_dict().items()}
            self.best = {**self.latest, "model": weights}
        self._end_of_step(trainer, pl_module)

    def _end_of_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        config = _module(pl_module).config.trainer
        step, (saved_step, saved_time) = trainer.global_step, self._saved_at
        limit = seconds(config.max_time)
        if limit is not None and time.monotonic() - self._started > limit:
            self._asked = self._asked or (f"trainer.max_time={config.max_time}", 0)
        due = step % config.checkpoint_every == 0 or time.monotonic() - saved_time > 60 * config.checkpoint_minutes
        due, asked = _agree(trainer, (due or step == config.max_steps, self._asked))
        if step != saved_step and (due or asked):
            self.save(trainer, pl_module)
        if asked and step < config.max_steps:
            raise Stopped(step, *asked)

    def save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the checkpoint of this step (process 0) while the others wait."""
        module = _module(pl_module)
        if trainer.is_global_zero:
            state = {
                "step": trainer.global_step,
                "config": to_dict(module.config),
                "model": module.model.state_dict(),
                "optimizer": trainer.optimizers[0].state_dict(),
                "best": self.best,
                "latest": self.latest,
                "wall_seconds": self.wall_seconds(),
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
            }
            checkpoint.save(self.run.last, state, previous=self.run.previous)
        trainer.strategy.barrier()
        self._saved_at = (trainer.global_step, time.monotonic())

    def wall_seconds(self) -> float:
        """Return the time of this launch and, of earlier ones, what led up to a checkpoint."""
        return self.earlier_seconds + time.monotonic() - self._started

    def write_best(self, module: LitClassifier) -> None:
        """Write the weights that did best on validation, on their own."""
        assert self.best is not None
        checkpoint.save(self.run.best, {"config": to_dict(module.config), **self.best})


def _agree(trainer: L.Trainer, asked: tuple[bool, tuple[str, int] | None]) -> tuple[bool, tuple[str, int] | None]:
    """Do what process 0 wants, or what any process was asked by a signal; all of them at the same step."""
    if trainer.world_size == 1:
        return asked
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, asked)
    return gathered[0][0], next((stop for _, stop in gathered if stop), None)


def _module(module: L.LightningModule) -> LitClassifier:
    assert isinstance(module, LitClassifier)
    return module
