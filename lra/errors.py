"""The one error of this package that a person should read: what was expected, what came, what to do."""

from __future__ import annotations


class DataError(RuntimeError):
    """Data that is absent, damaged or not what it should be. The message is one line and names the file or record."""
