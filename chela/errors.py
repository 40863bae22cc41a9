"""Errors that a person can mend: one line on stderr and an exit status, no traceback."""

from __future__ import annotations

from lra.errors import UserError


class UsageError(UserError):
    """Something in the command, the configuration or a run's files is not as expected."""


class DivergedError(UsageError):
    """The loss or a gradient is no longer a finite number."""

    status = 3
