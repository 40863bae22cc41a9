"""Options of the data pipeline that all tasks share. Standard library only; a task's own options are its fields."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from chela.core.options import option


@dataclass
class DataConfig:
    """Where data lies, where it comes from, how batches are made."""

    dir: str = option("", "folder for prepared records; empty: $CHELA_DATA, else ~/.cache/chela", identity=False)
    root: str | None = option(None, "folder or archive of your own to take the data from", identity=False)
    source: str = option("auto", "'auto': the task's own data; of retrieval also 'imdb', not LRA's")
    download: bool = option(True, "fetch data that is not there; false: say what is missing", identity=False)
    validation: str = option(
        "holdout", "'holdout': data kept apart; 'test': the test set, as some papers do", choices=("holdout", "test")
    )
    processes: int = option(0, "parallel workers that build records; 0: one per core", ge=0, le=1024, identity=False)
    workers: int = option(0, "loader workers; 0: load in the training process", ge=0, le=256, identity=False)
    carry: bool = option(
        False, "texts: read in order, the network's state carried from window to window", neutral=False
    )
    pool: int = option(8, "batches per bucketing pool: larger pools pad less and shuffle less", ge=1, le=100_000)

    def split(self, name: str) -> str:
        """Return the split that is read where ``name`` is asked for: ``validation`` says what validates."""
        return "test" if (name, self.validation) == ("validation", "test") else name

    def folder(self) -> Path:
        """Return the folder for prepared records, with the environment and ``~`` resolved."""
        folder = self.dir or os.environ.get("CHELA_DATA") or "~/.cache/chela"
        return Path(os.path.expanduser(folder))  # leaves an unknown ~user alone, where Path.expanduser raises
