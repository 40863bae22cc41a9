"""Errors that a person can mend: one line on stderr and an exit status, no traceback."""

from __future__ import annotations


class UsageError(Exception):
    """Something in the command, the configuration or the files is not as expected.

    The message is one line: what was expected, what came, what to do.
    """

    status = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class OptionError(UsageError, ValueError):
    """An option that there is not, or a value that it cannot have."""


class DataError(UsageError):
    """Data that is absent, damaged or not what it should be. The message names the file or the record."""


class DivergedError(UsageError):
    """The loss or a gradient is no longer a finite number."""

    status = 3


def first_line(error: Exception) -> str:
    """Return what an error says first, cut when long."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
