"""Score trained language models in windows longer than those they were trained on, and by position in the window.

chela length runs/corpus-mini/…                        bits at 1, 2, 4 and 8 times the training window
chela length RUN RUN … out=length.png                  and a figure of them all

Windows overlap by half, so that a symbol has at least half a window before it. The figures stay in each run's folder,
in length.json, from where a finished run's are taken the next time.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.config.words import command
from chela.core.errors import UsageError
from chela.core.files import write_whole
from chela.core.options import option
from chela.evaluate import RunWords
from chela.predict import load_run
from chela.training.score import Reading, batches, expect_prefill, total
from chela.training.step import scores_of
from experiments.rows import row_names
from experiments.runs import LENGTH, Run, read_runs
from lra.batches import Batch
from lra.datamodule import LRADataModule
from lra.source import DataConfig
from lra.tasks.base import IGNORED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS = 16384  # scored at once


@dataclass
class Words:
    """The words of the command."""

    runs: list[str] = option(MISSING, "run folders, or folders above them, of language models", positional=True)
    times: list[int] = option([1, 2, 4, 8], "windows, in training windows")
    split: str = option("test", "what is scored", choices=("test", "validation"))
    data_root: str = option("", "where the text lies, when not where it lay in training", key="data.root")
    data_dir: str = option("", "where prepared records lie, in the same case", key="data.dir")
    trust: str = option("", "modules that the runs may name, separated by commas")
    again: bool = option(False, "score a finished run again, whatever its length.json tells")
    out: Path | None = option(None, "a figure of all runs")


@command(Words, __doc__)
def main(words: Words) -> int:
    """Score the runs, one after another; return the exit status."""
    if not all(factor > 0 for factor in words.times):
        raise UsageError(f"times: expected numbers from 1, got {', '.join(map(str, words.times))}")
    runs, found = read_runs(words.runs), {}
    labels = row_names(runs)
    seen = Counter(labels.values())
    for run in runs:
        name = labels[run.path] if seen[labels[run.path]] == 1 else run.path.name
        found[name] = scores = ({} if words.again else _told(run, words)) or _scored(run, words)
        bits = ", ".join(f"{row['bits']:.4f} at {row['window']:,}" for row in scores["windows"])
        left = "".join(f"; {row}" for row in scores["not_scored"])
        sys.stdout.write(f"{run.path.name}: bits by window: {bits}{left}\n")
    if words.out:
        from experiments.plot import save

        save(drawn(found), words.out)
    return 0


def _told(run: Run, words: Words) -> dict[str, Any]:
    """Return what a finished run's ``length.json`` tells, if it is of this split and these windows."""
    told = run.record.get("length", {}) if run.state == "finished" else {}
    scored = [row["window"] for row in told.get("windows", [])]
    asked = [told.get("training_window", 0) * factor for factor in words.times]
    whole = scored == asked[: len(scored)] and len(scored) + len(told.get("not_scored", [])) == len(asked)
    return told if whole and told.get("split") == words.split else {}


def _scored(run: Run, words: Words) -> dict[str, Any]:
    """Score a run, and write down what was found."""
    named = RunWords(str(run.path), trust=words.trust, data_dir=words.data_dir, data_root=words.data_root)
    model, task = load_run(named)
    if not task.in_order:
        raise UsageError(f"expected runs on a text, {run.path} is one of {task.name}")
    data = named.load_config().data
    task.prepare(data)
    scores = by_length(model, task, data.split(words.split), words.times)
    write_whole(run.path / LENGTH, (json.dumps(scores, indent=1) + "\n").encode())
    return scores


def by_length(model: nn.Module, task: Any, split: str, times: Sequence[int]) -> dict[str, Any]:
    """Return bits a symbol by window, and of the training window by position.

    Args:
        model: In eval mode.
        task: A prepared text.
        split: What is scored.
        times: Windows, in training windows.

    Returns:
        "windows": of each its length, the symbols before a target at least, and the bits; "not_scored": why longer
        ones have none;
        "positions": of each doubling of the position in a training window that stands alone, its last position and
        the bits of the targets there.
    """
    size = max(1, TOKENS // task.l_max)
    data = LRADataModule(task, DataConfig(), batch_size=size, seed=0, max_steps=1)
    rows, not_scored = [], []
    for window in (task.l_max * factor for factor in times):
        try:
            if window > task.l_max:
                expect_prefill(model, f"a window of {window}")
        except UsageError as error:
            not_scored.append(str(error))
            continue
        nats, targets = by_position(model, data, split, Reading("stride", window)).sum(1).tolist()
        rows.append({"window": window, "context": window // 2, "bits": nats / targets / math.log(2)})
    nats, targets = by_position(model, data, split, Reading())
    edges = [0, *(2**i for i in range((task.l_max - 1).bit_length())), task.l_max]
    positions = [
        {"up_to": stop, "bits": float(nats[start:stop].sum() / targets[start:stop].sum() / math.log(2))}
        for start, stop in itertools.pairwise(edges)
    ]
    told = {"split": split, "training_window": task.l_max, "windows": rows, "not_scored": not_scored}
    return told | {"positions": positions}


def by_position(model: nn.Module, data: LRADataModule, split: str, reading: Reading) -> Tensor:
    """Return by position in the window the sum of the losses in nats, and the number of targets: ``(2, window)``."""
    window, _ = reading.of(data.task)

    def count(batch: Batch) -> Tensor:
        scores, labels = scores_of(model, batch), batch["labels"]
        loss = F.cross_entropy(scores.mT.float(), labels, ignore_index=IGNORED, reduction="none")
        counts = torch.stack([loss.double().sum(0), (labels != IGNORED).double().sum(0)])
        return F.pad(counts, (0, window - labels.shape[1]))

    return total(model, batches(data, model, split, reading), count)


def drawn(found: dict[str, dict[str, Any]]) -> Figure:
    """Draw bits against the window, and against the position in the training window."""
    from experiments.plot import colours, new_figure

    figure, axes = new_figure(2, 2, 5.2, 3.6)
    colour = colours(list(found))
    by_window = ("windows", "window", "window, half of it at least before a symbol")
    by_position = ("positions", "up_to", "position in a training window")
    for axis, (part, place, label) in zip(axes.flat, (by_window, by_position), strict=True):
        for name, scores in found.items():
            rows = scores[part]
            at, bits = [row[place] for row in rows], [row["bits"] for row in rows]
            axis.plot(at, bits, marker=".", color=colour[name], label=name)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set(xlabel=label, ylabel="bits a symbol")
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
