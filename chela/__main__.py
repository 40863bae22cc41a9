"""CHELA: train and score systems for long sequences.

chela COMMAND key=value …      also python -m chela COMMAND; chela COMMAND --help tells the rest
"""

from __future__ import annotations

import importlib
import sys

from chela import __version__
from chela.config.words import guarded
from chela.core.errors import UsageError
from chela.core.options import closest, shown

COMMANDS = {
    "train": ("chela.train", "train a system on a task, or go on with a run"),
    "evaluate": ("chela.evaluate", "score a run again, from its checkpoint"),
    "predict": ("chela.predict", "label sequences of your own with a run"),
    "generate": ("chela.generate", "write on after a prompt, with a language model"),
    "models": ("chela.models.__main__", "list the systems with their size on a task"),
    "prepare": ("chela.prepare", "make or check the data of a task"),
    "sweep": ("experiments.sweep", "run a grid of tasks, systems and seeds"),
    "runs": ("experiments.runs", "collect the results of runs into three files"),
    "table": ("experiments.table", "make a table of runs"),
    "report": ("experiments.report", "make a page of tables and figures, or draw learning curves"),
    "probe": ("experiments.probe", "measure what attention adds, and scores in windows longer than in training"),
    "bench": ("experiments.bench.__main__", "measure speed and memory"),
}


def main(argv: list[str] | None = None) -> int:
    """Hand the words to the command that the first one names; return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("--help", "-h", "help"):
        listed = "".join(f"    {name:<10}{about}\n" for name, (_, about) in COMMANDS.items())
        sys.stdout.write(f"{(__doc__ or '').strip()}\n\nCommands:\n{listed}")
        return 0
    if words[0] == "--version":
        sys.stdout.write(f"chela {__version__}\n")
        return 0
    name, *rest = words

    def begin() -> int:  # guarded from here on: what it sets must be set before a command's module loads torch
        if name not in COMMANDS:
            raise UsageError(f"expected a command ({', '.join(COMMANDS)}), got {shown(name)}{closest(name, COMMANDS)}")
        return int(importlib.import_module(COMMANDS[name][0]).main(rest))

    return guarded(begin)


if __name__ == "__main__":
    sys.exit(main())
