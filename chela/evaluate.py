"""Score a trained run again, from its checkpoint.

chela evaluate                                     the newest run: its test set, by the best weights
chela evaluate run=runs/listops-mini/… checkpoint=last split=validation
chela evaluate run=… split=longer                  ListOps: trees longer than any it learned from
chela evaluate run=… out=F                         and the scores as JSON
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from chela.config.compose import resolve, run_folder
from chela.config.schema import Config
from chela.config.words import command
from chela.core.errors import UsageError
from chela.core.files import make_folder, write_whole
from chela.core.options import option


@dataclass
class RunOptions:
    """What names the weights of a run."""

    run: str = option("last", "the folder that a training run printed; last: the newest under runs/", positional=True)
    checkpoint: str = option("best", "the weights that did best on validation, or the last", choices=("best", "last"))
    trust: str = option("", "modules that the run may name, separated by commas")
    data_dir: str = option("", "where prepared records lie, when not where they lay in training", key="data.dir")
    data_root: str = option("", "where your own data lies, in the same case; null: the records do", key="data.root")

    def load_config(self) -> Config:
        """Read the run's configuration, with the data folders that these words give."""
        folder = run_folder(self.run)
        if self.run == "last":
            self.run = str(folder)
            sys.stderr.write(f"run {folder}\n")
        moved = {"data.dir": self.data_dir, "data.root": self.data_root}
        words = [f"{key}={value}" for key, value in moved.items() if value]
        return resolve([f"resume={folder}", f"trust={self.trust}", *words])  # refuses other data


@dataclass
class Options(RunOptions):
    """The words of the command."""

    split: str = option("test", "what is scored: test, validation, or a task's further test set (ListOps: longer)")
    out: str = option("", "a JSON file to write the scores to, with all their digits")


@command(Options, __doc__)
def main(options: Options) -> int:
    """Score a run, print one line, return the exit status."""
    config = options.load_config()
    out = Path(options.out).expanduser()
    if options.out:  # now, not after hours of scoring
        make_folder(out.parent, "out")
        if out.is_dir():
            raise UsageError(f"out: expected a file, got the folder {out}")
    from chela.training.machine import stdout_console
    from chela.training.run import RunFolder
    from chela.training.score import evaluate

    score, found = evaluate(config, RunFolder(run_folder(options.run)), options.checkpoint, options.split)
    found["count"] = int(found["count"])
    numbers = {name: value for name, value in found.items() if isinstance(value, float) and name != score.name}
    about = {"task": config.task.name, "preset": config.preset, "model": config.model.name, "seed": config.seed}
    about |= {"split": options.split, "checkpoint": options.checkpoint}
    say = stdout_console().print
    say(f"{config.task.name} {config.preset} {config.model.name} seed {config.seed}, {options.checkpoint} weights")
    columns = "".join(f", {name} {value:.4f}" for name, value in numbers.items())
    say(f"{options.split}: {score.text(found)} of {found['count']:,}{columns}")
    for name, by in found.items():
        if isinstance(by, dict):
            for number, part in by.items():
                say(f"{name.replace('_', ' ')} {number}: {score.text(part)} of {part['count']:,.0f}")
    if "context" in found:
        say(f"context: {found['context']}" + (f"; {found['words']:,} words" if "words" in found else ""))
    if options.out:
        write_whole(out, (json.dumps(about | found, indent=2) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
