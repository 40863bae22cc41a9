"""One launch at a time in a run folder."""

from __future__ import annotations

import fcntl
import os
import platform
from pathlib import Path

from chela.errors import UsageError


class RunLock:
    """Held while a launch writes into a run folder; it falls with the process, however that ends.

    A POSIX record lock: unlike ``flock`` it is not handed on to forked loader workers, which can outlive a process that
    was killed by some seconds. File systems without locks are used without one.

    Raises:
        UsageError: Another launch holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (open for as long as it is held)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise UsageError(
                f"expected that nobody works on {folder}, another launch does ({holder}); wait for it or stop it"
            ) from None
        except OSError:
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}")
        self._file.flush()

    def release(self) -> None:
        """Let the next one in."""
        self._file.close()
