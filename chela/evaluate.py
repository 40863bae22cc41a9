"""Score a trained run again, from its checkpoint.

python -m chela.evaluate run=runs/listops-mini/…                        the test set, by the best weights
python -m chela.evaluate run=… checkpoint=last split=validation
python -m chela.evaluate run=runs/listops-mini/… split=longer           trees longer than any it learned from
python -m chela.evaluate run=runs/shakespeare-mini/… eval.context=stride eval.window=1024 eval.stride=256 out=score.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path

from chela.config.compose import load, run_folder
from chela.config.identity import fingerprint
from chela.config.schema import Config
from chela.config.words import command
from chela.core.errors import UsageError
from chela.core.files import write_whole
from chela.core.options import option


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
            before, learned = fingerprint(config), config.data.root
            config.data.root = None if self.data_root == "null" else self.data_root
            if fingerprint(config) != before:  # whose weights would be refused as another run's
                raise UsageError(
                    f"data.root: expected what the run learned from ({Path(learned or 'null').name}), wherever it "
                    f"lies, got {self.data_root}; a text must have the same name"
                )
        return config


@dataclass
class Words(RunWords):
    """The words of the command."""

    split: str = option("test", "what is scored: test, validation, or a task's further test set (ListOps: longer)")
    context: str = option(
        "window",
        "texts: windows, each alone; windows that overlap; or one stream, the state carried on",
        choices=("window", "stride", "stream"),
        key="eval.context",
    )
    window: int = option(0, "texts: symbols of a window; 0: as in training", ge=0, le=100_000_000, key="eval.window")
    stride: int = option(0, "texts: from one window to the next; 0: half a window", ge=0, key="eval.stride")
    out: str = option("", "a JSON file to write the scores to")


@command(Words, __doc__)
def main(words: Words) -> int:
    """Score a run, print one line, return the exit status."""
    config = words.load_config()
    out = Path(words.out).expanduser()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)  # not only after hours of scoring
    except OSError as error:
        raise UsageError(f"out: expected a file in a folder to write to, got {words.out} ({error.strerror})") from None
    from chela.training.machine import stdout_console
    from chela.training.run import RunFolder
    from chela.training.score import Reading, evaluate

    reading = Reading(words.context, words.window, words.stride)
    score, found = evaluate(config, RunFolder(run_folder(words.run)), words.checkpoint, words.split, reading)
    told = ("count", score.name, "context", "words", "word_perplexity")
    groups = {name: by for name, by in found.items() if name.startswith("by_")}
    columns = ", ".join(f"{name} {value!r}" for name, value in found.items() if name not in (*told, *groups))
    console = stdout_console()
    console.print(
        f"{config.task.name} {config.preset} {config.model.name} seed {config.seed}: {words.split} {score.name} "
        f"{found[score.name]!r} of {found['count']:.0f}, {columns}, by the {words.checkpoint} weights"
    )
    for name, by in groups.items():
        parts = ", ".join(f"{number}: {score.text(part)} of {part['count']:.0f}" for number, part in by.items())
        console.print(f"{name.replace('_', ' ')}: {parts}")
    if "context" in found:
        by_word = f"; {found['word_perplexity']!r} for each of {found['words']:,} words" if "words" in found else ""
        console.print(f"context: {found['context']}{by_word}")
    if words.out:
        about = {"task": config.task.name, "preset": config.preset, "model": config.model.name, "seed": config.seed}
        about |= {"split": words.split, "checkpoint": words.checkpoint}
        scores = {"nats" if name == "loss" and "context" in found else name: value for name, value in found.items()}
        text = json.dumps({**about, **scores, "count": int(found["count"])}, indent=2) + "\n"
        write_whole(out, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
