"""Score a trained run again, from its checkpoint.

python -m chela.evaluate run=runs/listops-mini/…                        the test set, by the best weights
python -m chela.evaluate run=… checkpoint=last split=validation
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass

from chela.cli import command
from chela.config import load, run_folder
from chela.schema import Config
from lra.options import option


@dataclass
class RunWords:
    """What names the weights of a run."""

    run: str = option(MISSING, "the folder that a training run printed", positional=True)
    checkpoint: str = option("best", "the weights that did best on validation, or the last", choices=("best", "last"))
    trust: str = option("", "modules that the run may name, separated by commas")
    data_dir: str = option("", "where prepared records lie, when not where they lay in training", key="data.dir")
    data_root: str = option("", "where your own data lies, in the same case; null: the records do", key="data.root")

    def load_config(self) -> Config:
        """Read the run's configuration, with the data where these words say it lies."""
        config = load(run_folder(self.run) / "config.yaml", self.trust)
        config.data.dir = self.data_dir or config.data.dir
        if self.data_root:  # where the run's own lay may be of another machine, or gone
            config.data.root = None if self.data_root == "null" else self.data_root
        return config


@dataclass
class Words(RunWords):
    """The words of the command."""

    split: str = option("test", "what is scored", choices=("test", "validation"))


def main(argv: list[str] | None = None) -> int:
    """Read the words, score the run, print one line; return the exit status."""
    return command(Words, evaluate, __doc__ or "", argv)


def evaluate(words: Words) -> int:
    """Score the run that ``words`` name."""
    config = words.load_config()
    from chela.training import fit
    from chela.training.machine import stdout_console
    from chela.training.run import RunFolder

    score, found = fit.evaluate(config, RunFolder(run_folder(words.run)), words.checkpoint, words.split)
    columns = ", ".join(f"{name} {value!r}" for name, value in found.items() if name not in ("count", score.name))
    stdout_console().print(
        f"{config.task.name} {config.preset} {config.model.name} seed {config.seed}: {words.split} {score.name} "
        f"{found[score.name]!r} of {found['count']:.0f}, {columns}, by the {words.checkpoint} weights"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
