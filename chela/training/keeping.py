"""Saving, stopping and going on: a run that is cut into pieces ends where an uncut one does.

Lightning's own resume changes the data order and its timer is restored with the run, so neither is used. A launch is
a fresh fit whose step counters start where the last one stopped; data order, dropout and learning rate follow from the
step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L

from chela.config import fingerprint, seconds
from chela.errors import DivergedError, UsageError
from chela.training import checkpoint
from chela.training.module import LitClassifier
from chela.training.processes import agree, in_first
from chela.training.run import RunFolder
from chela.training.signals import Signals, Stopped, stopped_by
from chela.training.steps import StepCallback
from lra.files import sync

_TIME_IS_UP = 1  # beside the numbers of signals, of which SIGHUP, 1, is not caught


class Keeper(StepCallback):
    """Restore at the start, save on the way, stop when asked to.

    A checkpoint is only taken when everything that belongs to its step has been done, the validation included.

    Args:
        run: The run folder; None on all processes but the first.
        goes_on: Start from the newest checkpoint.
        signals: Requests to stop.
        started: When this launch began, by ``time.monotonic()``.
        say: Prints a line.
    """

    def __init__(
        self, run: RunFolder | None, goes_on: bool, signals: Signals, started: float, say: Callable[[str], object]
    ) -> None:
        self._run, self.goes_on, self.signals, self.say = run, goes_on, signals, say
        self.parts: dict[str, Any] = {}  # other callbacks whose state belongs to the checkpoint
        self.best: dict[str, Any] | None = None
        self.latest: dict[str, Any] = {}
        self.first_step = 0
        self.earlier_seconds = 0.0
        self._started = started
        self._saved_step, self._saved_at = 0, time.monotonic()

    @property
    def run(self) -> RunFolder:
        """The run folder."""
        assert self._run is not None, "known to all processes once the trainer has set up"
        return self._run

    @property
    def has_run(self) -> bool:
        """Whether the folder is known, so that there is a run to go on with."""
        return self._run is not None

    # ---- start ----

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Agree on the folder: only process 0 knows it."""
        self._run, self.goes_on = trainer.strategy.broadcast((self._run, self.goes_on))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put weights, optimiser and step counters where the last launch left them."""
        module = _module(pl_module)
        state = self._load(trainer, fingerprint(module.config)) if self.goes_on else None
        if state is not None:
            self._restore(trainer, module, state)
        elif self.goes_on:
            self.say("no checkpoint yet: from the first step")
        config = module.config.trainer
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = self.first_step
        # Lightning validates at multiples of val_every in this count; shifted so that the last step is one of them
        shifted = self.first_step + -config.max_steps % config.val_every
        batches = shifted * config.accumulate
        loop.batch_progress.total.ready = loop.batch_progress.total.completed = batches
        trainer.datamodule.first_step = self.first_step  # type: ignore[attr-defined]

    def _load(self, trainer: L.Trainer, identity: str) -> dict[str, Any] | None:
        """Read the checkpoint in process 0, for all: each must go on from the same one."""
        try:
            return in_first(trainer, lambda: self.run.load_last(identity, self.say))
        except UsageError as error:
            raise UsageError(f"resume: {error}") from None

    def _restore(self, trainer: L.Trainer, module: LitClassifier, state: dict[str, Any]) -> None:
        try:
            module.model.load_state_dict(state["model"])
            trainer.optimizers[0].load_state_dict(state["optimizer"])
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise UsageError(
                f"resume: expected the weights and optimiser of this run's model, got others "
                f"({reason}); use the version of chela that wrote them"
            ) from None
        self.best, self.latest, self.first_step = state["best"], state["latest"], state["step"]
        self.earlier_seconds = state["wall_seconds"]
        self._saved_step = self.first_step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a signal waits for the end of a step."""
        self.signals.take()
        self.signals.patient = True
        self._saved_at = time.monotonic()

    # ---- on the way ----

    def on_step_end(self, trainer: L.Trainer, module: LitClassifier) -> None:
        """Save or stop, unless this step's validation is still to come."""
        config = module.config.trainer
        if (config.max_steps - trainer.global_step) % config.val_every:
            self._end_of_step(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the weights when they are the best so far, then save or stop."""
        module = _module(pl_module)
        accuracy = module.evaluated["accuracy"]
        self.latest = {"accuracy": accuracy, "step": trainer.global_step}
        if self.best is None or accuracy > self.best["accuracy"]:
            weights = {name: value.detach().cpu().clone() for name, value in module.model.state_dict().items()}
            self.best = {**self.latest, "model": weights}
        self._end_of_step(trainer, module)

    def _end_of_step(self, trainer: L.Trainer, module: LitClassifier) -> None:
        config = module.config.trainer
        step, now = trainer.global_step, time.monotonic()
        limit = seconds(config.max_time)
        asked = self.signals.asked or (_TIME_IS_UP if limit is not None and now - self._started > limit else 0)
        due = (
            step % config.checkpoint_every == 0
            or step == config.max_steps
            or now - self._saved_at > 60 * config.checkpoint_minutes
        )
        due, asked = agree(trainer, due, asked)
        if step != self._saved_step and (due or asked):
            self.save(trainer, module)
        if asked == _TIME_IS_UP and step < config.max_steps:
            raise Stopped(f"trainer.max_time={config.max_time}", 0, step)
        if asked > _TIME_IS_UP:
            raise stopped_by(asked, step)

    def save(self, trainer: L.Trainer, module: LitClassifier) -> None:
        """Write the checkpoint of this step (process 0) while the others wait.

        Raises:
            DivergedError: A weight is no finite number; the checkpoint before this step is kept.
            UsageError, OSError: It could not be written.
        """
        weights = module.model.state_dict()
        bad = next((name for name, value in weights.items() if not value.isfinite().all()), None)
        if bad is not None:
            raise DivergedError(module.divergence(bad, trainer.global_step))
        in_first(trainer, lambda: self._write(trainer, weights, fingerprint(module.config)))
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def _write(self, trainer: L.Trainer, weights: dict[str, Any], identity: str) -> None:
        state = {
            "step": trainer.global_step,
            "fingerprint": identity,
            "model": weights,
            "optimizer": trainer.optimizers[0].state_dict(),
            "best": self.best,
            "latest": self.latest,
            "wall_seconds": self.wall_seconds(),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        if self.run.metrics.exists():
            sync(self.run.metrics)  # a checkpoint never outlives the lines that led to it
        checkpoint.save(self.run.last, state, previous=self.run.previous)

    def wall_seconds(self) -> float:
        """Return the time of this launch and, of earlier ones, what led up to a checkpoint."""
        return self.earlier_seconds + time.monotonic() - self._started

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All is saved: a signal need not wait any more."""
        self.signals.patient = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """What is left to do needs no more patience."""
        self.signals.patient = False

    def write_best(self, module: LitClassifier) -> None:
        """Write the weights that did best on validation, on their own."""
        assert self.best is not None
        checkpoint.save(self.run.best, {"fingerprint": fingerprint(module.config), **self.best})


def _module(module: L.LightningModule) -> LitClassifier:
    assert isinstance(module, LitClassifier)
    return module
