"""Measure what a trained run's attention adds to its score, or what a language model makes of longer windows.

chela probe runs/recall-hard/…                        the test set, three times
chela probe runs/recall-hard/… records=500            a part of it
chela probe runs/corpus-mini/… times=1,2,4,8          bits in windows so many times as long as in training

The test set is scored once as the network is, once with the attention's output replaced at every position by its mean
over the sequence (in a causal network over what came so far), once by zeros. What the mean takes away is what the
attention selects for a position. The figures stay in the run's folder, in probe.json, where tables (probe=true) and
reports find them.

With ``times`` windows overlap by half, so that a symbol has at least half a window before it. Those figures stay in
length.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chela.config.compose import run_folder
from chela.config.words import command
from chela.core.errors import UsageError
from chela.core.options import option
from chela.evaluate import RunOptions
from chela.layers.attention import Attended
from chela.predict import load_run
from chela.training.objectives import Objective, Score
from chela.training.score import overlapping, sum_counts
from chela.training.step import scores_of
from experiments.runs import FILES, write
from lra.batches import Batch
from lra.datamodule import LRADataModule
from lra.source import DataConfig

TOKENS = 16384  # of a text, scored at once


@dataclass
class Options(RunOptions):
    """The words of the command."""

    records: int = option(0, "records of the test set, from the first on; 0: all", ge=0, le=1_000_000_000)
    batch: int = option(64, "records in a batch", ge=1, le=1_000_000)
    times: list[int] = option([], "score a text in windows of so many training windows instead")


@command(Options, __doc__)
def main(options: Options) -> int:
    """Probe a run; return the exit status."""
    if not all(factor > 0 for factor in options.times):
        raise UsageError(f"times: expected numbers from 1, got {', '.join(map(str, options.times))}")
    model, task = load_run(options)
    if options.times and not task.in_order:
        raise UsageError(f"times: expected a run on a text, {options.run} is one of {task.name}")
    if not (options.times or any(isinstance(module, Attended) for module in model.modules())):
        raise UsageError(f"expected a run with attention, that of {options.run} has none")
    task.prepare(options.load_config().data)
    if options.times:
        found = by_length(model, task, options.times)
        lines = [f"window {row['window']:,}: {row['bits']:.4f} bits a symbol" for row in found["windows"]]
        lines += found["not_scored"]
    else:
        found = attention_adds(model, task, records=options.records, batch=options.batch)
        score = Score(**found["score"])
        lines = [f"{way}: {score.text({score.name: value})}" for way, value in found["scores"].items()]
        lines.append(f"attention adds {found['adds']:.{score.digits}f} {score.unit}")
    write(run_folder(options.run) / FILES["length" if options.times else "probe"], json.dumps(found, indent=2) + "\n")
    print(*lines, sep="\n")
    return 0


def attention_adds(model: nn.Module, task: Any, *, records: int = 0, batch: int = 64) -> dict[str, Any]:
    """Score a network three times on the test set: as it is, with the mean of its attention, without it.

    Args:
        model: Maps ``(inputs, mask)`` to scores.
        task: Prepared.
        records: Take the first so many; 0 takes all.
        batch: Records at a time.

    Returns:
        "scores" by way, and "adds": what the mean takes away, in the score's unit, positive if attention helps.
    """
    objective, test = Objective(task), task.dataset("test")
    chosen = np.arange(len(test))[: records or None]
    data = LRADataModule(task, DataConfig(), batch_size=batch, seed=0, max_steps=1)
    built_from = getattr(model, "built_from", None)
    causal = built_from is not None and built_from[0].causal
    attentions = [module for module in model.modules() if isinstance(module, Attended)]
    score, scores = objective.score, {}
    for way in ("as it is", "mean", "zeros"):

        def count(given: Batch, way: str = way) -> Tensor:
            with ExitStack() as hooks:
                for module in attentions if way != "as it is" else ():
                    instead = partial(_instead, way == "mean", causal, given["mask"])
                    hooks.enter_context(module.register_forward_hook(instead))
                return objective.count(scores_of(model, given), given["labels"])

        scores[way] = objective.values(sum_counts(model, data.evaluation(test, chosen), count).tolist())[score.name]
    sign = 1 if score.best == "max" else -1
    adds = sign * score.scale * (scores["as it is"] - scores["mean"])
    return {"records": len(chosen), "score": asdict(score), "scores": scores, "adds": adds}


def _instead(mean: bool, causal: bool, mask: Tensor | None, module: nn.Module, args: object, output: Tensor) -> Tensor:
    """Return the replacement of an attention's output: its mean over the real positions, or zeros."""
    if not mean:
        return torch.zeros_like(output)
    o = output.flatten(2).double()
    real = (o.new_ones(o.shape[:2]) if mask is None else mask.double())[..., None]
    if causal:  # the mean so far: that of the whole would leak the future
        means = (o * real).cumsum(1) / real.cumsum(1).clamp(min=1)
    else:
        means = (o * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
    return means.to(output.dtype).expand(-1, output.shape[1], -1).reshape(output.shape)


def by_length(model: nn.Module, task: Any, times: Sequence[int]) -> dict[str, Any]:
    """Return the bits a symbol of the test set of a prepared text, in windows of so many training windows.

    Returns:
        "windows": of each its length, the symbols before a target at least, and the bits; "not_scored": why longer ones
        have none.
    """
    size, objective = max(1, TOKENS // task.l_max), Objective(task)
    data = LRADataModule(task, DataConfig(), batch_size=size, seed=0, max_steps=1)
    rows, not_scored = [], []
    for window in (task.l_max * factor for factor in times):
        try:
            read = overlapping(data, model, "test", window)
        except UsageError as error:  # a network that ends at the training window
            not_scored.append(str(error))
            continue
        counts = sum_counts(model, read, lambda batch: objective.count(scores_of(model, batch), batch["labels"]))
        rows.append({"window": window, "context": window // 2, "bits": objective.values(counts.tolist())["bits"]})
    return {"split": "test", "training_window": task.l_max, "windows": rows, "not_scored": not_scored}


if __name__ == "__main__":
    sys.exit(main())
