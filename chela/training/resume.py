"""Stopping and going on: signals, and checkpoints that are whole or absent and never unpickled.

A run that is cut into launches ends where an uncut one does: data order, dropout and learning rate follow from the step
of the whole run, so that weights, optimiser and ``RunState`` are all that has to be restored; with ``data.carry`` also
what the network remembers of the text so far.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeVar, cast

import torch
from lightning.fabric import Fabric
from torch import Tensor

from chela.core.errors import UsageError, first_line
from chela.core.files import write_whole

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TIME_IS_UP = 1  # stands where a signal's number may stand; 1 is SIGHUP, which is not caught
FORMAT_VERSION = 2


class Stopped(BaseException):
    """The run ends here on request, with an exit status. Not an ``Exception``: who catches those must not swallow it.

    ``step`` is the one that was saved; None when nothing new had to be.
    """

    def __init__(self, reason: str, status: int, step: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.status, self.step = reason, status, step


class Signals(contextlib.ExitStack):
    """Catches SIGTERM, SIGINT and SIGUSR1 from ``with`` on, until its end.

    While steps are taken (``patient``) a signal is only noted in ``asked``: the step is ended and saved first.
    Elsewhere nothing has to be saved, and the signal raises ``Stopped`` at once. A second SIGINT ends the process as if
    nobody caught it. Half a second must lie between the two: a launcher may pass on what the terminal has sent already.
    """

    SECOND_AFTER = 0.5  # seconds

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.patient = False
        self._asked_at = 0.0

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self.callback(signal.signal, number, signal.signal(number, self._ask))
        return self

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


# ---- checkpoints ----


class TornError(UsageError):
    """A file that is not, or no longer, a checkpoint: an older one may still be whole."""


def save(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint in one stroke."""
    buffer = io.BytesIO()  # so that a full disk is an OSError of ours, and nothing but bytes is left to go wrong
    torch.save({"format_version": FORMAT_VERSION, **state}, buffer)
    write_whole(path, buffer.getvalue(), previous)


def load(path: Path, keys: tuple[str, ...], identity: str) -> dict[str, Any]:
    """Read a checkpoint that holds ``keys``, of this fingerprint; only tensors and plain values are accepted.

    TornError where it is absent, torn or foreign; UsageError where it is of another version or configuration.
    """
    if not path.is_file():
        raise TornError(f"expected a checkpoint at {path}, there is none")
    try:
        # torch itself does not look at the checksums, and what is no archive it would read as plain pickle
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise ValueError(f"{bad} has another checksum than was written")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or "format_version" not in state:
            raise ValueError("it is one without a format version")
        version, missing = state["format_version"], [key for key in (*keys, "fingerprint") if key not in state]
        if missing and version == FORMAT_VERSION:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except Exception as error:  # torch may raise anything on a foreign file
        reason = first_line(error)[:120]
        raise TornError(f"expected a whole checkpoint at {path}, it is torn or foreign ({reason})") from None
    if version != FORMAT_VERSION:
        other = "use the version of chela that wrote it"
        raise UsageError(f"expected format version {FORMAT_VERSION} in {path}, got {version!r}; {other}")
    if state["fingerprint"] != identity:
        raise UsageError(
            f"expected a checkpoint of this run's configuration ({identity}) at {path}, got one of "
            f"another ({state['fingerprint']}); put back the run's own file, or the code it was trained with"
        )
    return state


@contextlib.contextmanager
def loading(path: Path) -> Iterator[None]:
    """Turn what ``load_state_dict`` says of what does not fit into a UsageError."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"expected the weights and optimiser of this run's model, got others in {path} "
            f"({first_line(error)[:120]}); use the version of chela that wrote them"
        ) from None


# ---- several processes: torchrun or Fabric started them, and each knows its own part only ----


def on_rank_zero(fabric: Fabric, work: Callable[[], T]) -> T | None:
    """Do ``work`` in process 0 and return in every process what it returns.

    A UsageError or OSError that it raises is raised in all, which would wait for process 0 for ever.
    """
    result, error = None, None
    if fabric.is_global_zero:
        try:
            result = work()
        except (UsageError, OSError) as problem:
            error = problem
    result, message = fabric.broadcast((result, None if error is None else str(error)))
    if message is not None:
        raise error or UsageError(message)
    return result


def agree(fabric: Fabric, due: bool, asked: int) -> tuple[bool, int]:
    """Save when process 0 wants to, stop when any process is asked to; all of them at the same step."""
    if fabric.world_size == 1:
        return due, asked
    both: Any = torch.tensor([int(due and fabric.is_global_zero), asked], device=fabric.device)
    due, asked = fabric.all_reduce(both, reduce_op="max").tolist()  # type: ignore[union-attr]
    return bool(due), asked


def summed(fabric: Fabric, x: Tensor) -> Tensor:
    """Return the sum of ``x`` over the processes."""
    total: Any = fabric.all_reduce(x.clone(), reduce_op="sum")  # in place
    return cast(Tensor, total)
