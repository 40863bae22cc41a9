"""Saving, stopping and going on: a run that is cut into pieces ends where an uncut one does.

A launch is a fit of the remaining steps. Data order, dropout and learning rate follow from the step of the whole run,
so that weights, optimiser and ``RunState`` are all that has to be restored; with ``data.carry`` also what the network
remembers of the text so far.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import lightning as L
import torch

from chela.config import first_line, seconds
from chela.core.errors import DivergedError, UsageError
from chela.core.files import sync
from chela.identity import fingerprint, identities
from chela.training import checkpoint
from chela.training.module import LitModel, StepCallback
from chela.training.run import RunFolder, RunState

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_TIME_IS_UP = 1  # beside the numbers of signals, of which SIGHUP, 1, is not caught


class Stopped(BaseException):
    """The run ends here on request. Not an ``Exception``: whoever catches those must not swallow it.

    Args:
        reason: In a few words.
        status: Exit status of the process.
        step: Steps that are saved; None when nothing new had to be saved.
    """

    def __init__(self, reason: str, status: int, step: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.status, self.step = reason, status, step


class Signals:
    """Catches SIGTERM, SIGINT and SIGUSR1 from ``with`` on, until its end.

    While steps are taken (``patient``) a signal is only noted in ``asked``: the step is ended and saved first.
    Elsewhere nothing has to be saved, and the signal raises ``Stopped`` at once. A second SIGINT ends the process as if
    nobody caught it. Half a second must lie between the two: a launcher may pass on what the terminal has sent already.
    """

    SECOND_AFTER = 0.5  # seconds

    def __init__(self) -> None:
        self.asked = 0
        self.patient = False
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> None:
        """Take the signals (again): Lightning puts handlers of its own over them when it starts."""
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and number == signal.SIGINT and now - self._asked_at > self.SECOND_AFTER:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.asked:
            self.asked, self._asked_at = number, now
        if not self.patient:
            raise stopped_by(number)


def stopped_by(number: int, step: int | None = None) -> Stopped:
    """Return the ``Stopped`` of a signal."""
    return Stopped(signal.Signals(number).name, 128 + number, step)


class Keeper(StepCallback):
    """Restore at the start, save on the way, stop when asked to.

    A checkpoint is only taken when everything that belongs to its step has been done, the validation included. It must
    be the last callback, so that ``state`` holds what the others did in the step.

    Args:
        run: The run folder; None on all processes but the first.
        goes_on: Start from the newest checkpoint.
        state: What the run remembers; filled from the checkpoint, and saved.
        signals: Requests to stop.
        started: When this launch began, by ``time.monotonic()``.
        say: Prints a line.
    """

    def __init__(
        self,
        run: RunFolder | None,
        goes_on: bool,
        state: RunState,
        signals: Signals,
        started: float,
        say: Callable[[str], object],
    ) -> None:
        self._run, self.goes_on, self.state, self.signals, self.say = run, goes_on, state, signals, say
        self._started, self._earlier = started, 0.0
        self._saved_step, self._saved_at = 0, time.monotonic()

    @property
    def run(self) -> RunFolder:
        """The run folder."""
        assert self._run is not None, "known to all processes once the trainer has set up"
        return self._run

    # ---- start ----

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tell all processes which folder it is: only process 0 knows."""
        self._run, self.goes_on = trainer.strategy.broadcast((self._run, self.goes_on))

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Put weights, optimiser and state where the last launch left them."""
        module: LitModel = pl_module
        if self.goes_on:
            try:  # in process 0, for all: each must go on from the same one
                saved = in_first(trainer, lambda: self.run.load_last(identities(module.config), self.say))
            except UsageError as error:
                raise UsageError(f"resume: {error}") from None
            if saved is None:
                self.say("no checkpoint yet: from the first step")
            else:
                self._restore(trainer, module, saved)
        module.first_step = self._saved_step = self.state.step
        trainer.datamodule.first_step = self.state.step  # type: ignore[attr-defined]
        trainer.should_stop = self.state.step >= module.config.trainer.max_steps

    def _restore(self, trainer: L.Trainer, module: LitModel, saved: dict[str, Any]) -> None:
        try:
            module.model.load_state_dict(saved["model"])
            trainer.optimizers[0].load_state_dict(saved["optimizer"])
            for part, state in saved.get("carried", {}).items():
                module.carried[part] = {name: value.to(module.device) for name, value in state.items()}
            for item in dataclasses.fields(self.state):
                if item.name in saved["state"] or item.name != "evaluation_seconds":  # older ones did not count these
                    setattr(self.state, item.name, saved["state"][item.name])
            if trainer.is_global_zero:  # one process alone, since they are summed over all
                module.of_run.update(torch.tensor(self.state.totals, dtype=torch.float64))
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"resume: expected the weights and optimiser of this run's model, got others "
                f"({first_line(error)[:120]}); use the version of chela that wrote them"
            ) from None
        self._earlier = self.state.wall_seconds

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let a signal wait for the end of a step from here on."""
        self.signals.take()
        self.signals.patient = True
        self._saved_at = time.monotonic()

    # ---- on the way ----

    def on_step_end(self, trainer: L.Trainer, module: LitModel) -> None:
        """Save or stop, unless this step's validation is still to come."""
        self.state.step = module.step
        config = module.config.trainer
        trainer.should_stop = module.step == config.max_steps
        if (config.max_steps - module.step) % config.val_every:
            self._end_of_step(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep the weights when they are the best so far, then save or stop."""
        module: LitModel = pl_module
        self.state.last = {"step": module.step, **module.evaluated}
        if module.objective.score.better(self.state.last, self.state.best):
            self.state.best = self.state.last
            self._save_best(trainer, module)
        self._end_of_step(trainer, module)

    def _end_of_step(self, trainer: L.Trainer, module: LitModel) -> None:
        config = module.config.trainer
        step, now = module.step, time.monotonic()
        limit = seconds(config.max_time)
        asked = self.signals.asked or (_TIME_IS_UP if limit is not None and now - self._started > limit else 0)
        late = now - self._saved_at > 60 * config.checkpoint_minutes
        due = late or step % config.checkpoint_every == 0 or step == config.max_steps
        due, asked = agree(trainer, due, asked)
        if step != self._saved_step and (due or asked):
            self.save(trainer, module)
        if asked == _TIME_IS_UP and step < config.max_steps:
            raise Stopped(f"trainer.max_time={config.max_time}", 0, step)
        if asked > _TIME_IS_UP:
            raise stopped_by(asked, step)

    def save(self, trainer: L.Trainer, module: LitModel) -> None:
        """Write the checkpoint of this step (process 0) while the others wait.

        Raises:
            DivergedError: A weight is no finite number; the checkpoint before this step is kept.
            UsageError, OSError: It could not be written.
        """
        module.expect_finite()
        bad = next((name for name, value in module.model.state_dict().items() if not value.isfinite().all()), None)
        if bad is not None:
            raise DivergedError(module.divergence(bad, module.step))
        self.state.totals = list(module.of_run.compute().values())
        self.state.wall_seconds = self.wall_seconds()
        in_first(trainer, lambda: self._write(trainer, module))
        self._saved_step, self._saved_at = module.step, time.monotonic()

    def _write(self, trainer: L.Trainer, module: LitModel) -> None:
        if self.run.metrics.exists():
            sync(self.run.metrics)  # a checkpoint never outlives the lines that led to it
        saved = {
            "step": module.step,
            "fingerprint": fingerprint(module.config),
            "model": module.model.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "state": dataclasses.asdict(self.state),
            **({"carried": module.carried} if module.carried else {}),
        }
        checkpoint.save(self.run.last, saved, previous=self.run.previous)

    def _save_best(self, trainer: L.Trainer, module: LitModel) -> None:
        """Write the best weights, on their own. Should the run be killed now, the same step gives the same again."""
        best = {"fingerprint": fingerprint(module.config), **self.state.last, "model": module.model.state_dict()}
        in_first(trainer, lambda: checkpoint.save(self.run.best, best))

    def wall_seconds(self) -> float:
        """Return the time of this launch and, of earlier ones, what led up to a checkpoint."""
        return self._earlier + time.monotonic() - self._started

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop waiting: all is saved."""
        self.signals.patient = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop waiting: what is left to do needs no patience."""
        self.signals.patient = False


# ---- several processes: torchrun or Lightning started them, and each knows its own part only ----


def in_first(trainer: L.Trainer, work: Callable[[], T]) -> T | None:
    """Do ``work`` in process 0 and return in every process what it returns.

    Raises:
        UsageError, OSError: What ``work`` raises; in the other processes always a UsageError. Without being told, they
            would wait for process 0 for ever.
    """
    result: T | None = None
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            result = work()
        except (UsageError, OSError) as problem:
            error = problem
    result, told = trainer.strategy.broadcast((result, None if error is None else str(error)))
    if told is not None:
        raise error or UsageError(told)
    return result


def agree(trainer: L.Trainer, due: bool, asked: int) -> tuple[bool, int]:
    """Save when process 0 wants to, stop when any process is asked to; all of them at the same step."""
    if trainer.world_size == 1:
        return due, asked
    row = torch.tensor([int(due and trainer.is_global_zero), asked], device=trainer.strategy.root_device)
    torch.distributed.all_reduce(row, op=torch.distributed.ReduceOp.MAX)
    return bool(row[0]), int(row[1])
