"""Score a trained language model in windows longer than those it was trained on.

chela length runs/corpus-mini/…                       bits at 1, 2, 4 and 8 times the training window

Windows overlap by half, so that a symbol has at least half a window before it. The figures stay in the run's folder, in
length.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from chela.config.compose import run_folder
from chela.config.words import command
from chela.core.errors import UsageError
from chela.core.files import write_whole
from chela.core.options import option
from chela.evaluate import RunWords
from chela.predict import load_run
from chela.training.objectives import objective_of
from chela.training.score import overlapping, total
from chela.training.step import scores_of
from experiments.runs import FILES
from lra.datamodule import LRADataModule
from lra.source import DataConfig

TOKENS = 16384  # scored at once


@dataclass
class Words(RunWords):
    """The words of the command."""

    times: list[int] = option([1, 2, 4, 8], "windows, in training windows")
    split: str = option("test", "what is scored", choices=("test", "validation"))


@command(Words, __doc__)
def main(words: Words) -> int:
    """Score a run; return the exit status."""
    if not all(factor > 0 for factor in words.times):
        raise UsageError(f"times: expected numbers from 1, got {', '.join(map(str, words.times))}")
    model, task = load_run(words)
    if not task.in_order:
        raise UsageError(f"expected a run on a text, {words.run} is one of {task.name}")
    data = words.load_config().data
    task.prepare(data)
    found = by_length(model, task, data.split(words.split), words.times)
    write_whole(run_folder(words.run) / FILES["length"], (json.dumps(found, indent=1) + "\n").encode())
    told = [f"window {row['window']:,}: {row['bits']:.4f} bits a symbol" for row in found["windows"]]
    print(*told, *found["not_scored"], sep="\n")
    return 0


def by_length(model: nn.Module, task: Any, split: str, times: Sequence[int]) -> dict[str, Any]:
    """Return bits a symbol by window.

    Args:
        model: In eval mode.
        task: A prepared text.
        split: What is scored.
        times: Windows, in training windows.

    Returns:
        "windows": of each its length, the symbols before a target at least, and the bits; "not_scored": why longer ones
        have none.
    """
    size, objective = max(1, TOKENS // task.l_max), objective_of(task)
    data = LRADataModule(task, DataConfig(), batch_size=size, seed=0, max_steps=1)
    rows, not_scored = [], []
    for window in (task.l_max * factor for factor in times):
        try:
            read = overlapping(data, model, split, window)
        except UsageError as error:  # a network that ends at the training window
            not_scored.append(str(error))
            continue
        counts = total(model, read, lambda batch: objective.count(scores_of(model, batch), batch["labels"]))
        rows.append({"window": window, "context": window // 2, "bits": objective.values(counts.tolist())["bits"]})
    return {"split": split, "training_window": task.l_max, "windows": rows, "not_scored": not_scored}


if __name__ == "__main__":
    sys.exit(main())
