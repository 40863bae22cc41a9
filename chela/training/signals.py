"""SIGTERM, SIGINT and SIGUSR1 as requests to stop."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


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
    """Catches the signals from ``with`` on, until its end.

    While steps are taken (``patient``) a signal is only noted in ``asked``: the step is ended and saved first.
    Elsewhere nothing has to be saved, and the signal raises ``Stopped`` at once. A second SIGINT ends the process as if
    nobody caught it; half a second must lie between the two, since a launcher may pass on what the terminal has sent
    already.
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
