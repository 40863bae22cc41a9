"""Measure what a trained run's attention adds to its score, from its checkpoint.

chela probe runs/recall-hard/…                        the test set, three times
chela probe runs/recall-hard/… records=500            a part of it

Once as it is, once with the attention's output replaced at every position by its mean over the sequence (in a causal
network over what came so far), once by zeros.
What the mean takes away is what the attention selects for a position. The figures stay in the run's folder, in
probe.json, where tables (probe=true) and reports find them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chela.config.compose import run_folder
from chela.config.words import command
from chela.core.errors import UsageError
from chela.core.files import write_whole
from chela.core.options import option
from chela.evaluate import RunWords
from chela.layers.attention import Attended
from chela.models.cost import cost
from chela.predict import load_run
from chela.training.objectives import Score, objective_of
from chela.training.score import total
from chela.training.step import scores_of
from experiments.runs import FILES, Run
from lra.batches import Batch
from lra.datamodule import LRADataModule
from lra.source import DataConfig
from lra.tasks import get_task


def state_size(run: Run) -> int | None:
    """Count the numbers that the run's causal form remembers of the longest sequence, all layers together.

    None where the system does not say, or the options are of a version that had others.
    """
    try:
        config = run.load_config()
        return cost(config.model, get_task(config.task)).state_size
    except UsageError:
        return None


@dataclass
class Words(RunWords):
    """The words of the command."""

    records: int = option(0, "records of the test set, from the first on; 0: all", ge=0, le=1_000_000_000)
    batch: int = option(64, "records in a batch", ge=1, le=1_000_000)


@command(Words, __doc__)
def main(words: Words) -> int:
    """Probe a run; return the exit status."""
    model, task = load_run(words)
    if not any(isinstance(module, Attended) for module in model.modules()):
        raise UsageError(f"expected a run with attention, that of {words.run} has none")
    task.prepare(words.load_config().data)
    found = attention_adds(model, task, records=words.records, batch=words.batch)
    write_whole(run_folder(words.run) / FILES["probe"], (json.dumps(found, indent=2) + "\n").encode())
    score = Score(**found["score"])
    for way, value in found["scores"].items():
        print(f"{way}: {score.text({score.name: value})}")
    print(f"attention adds {found['adds']:.{score.digits}f} {score.unit}")
    for layer in found["layers"]:
        print(f"{layer['name']}: varies over positions by {layer['varies']:.1%} of its norm")
    return 0


WAYS = ("as it is", "mean", "zeros")


def attention_adds(model: nn.Module, task: Any, *, records: int = 0, batch: int = 64) -> dict[str, Any]:
    """Score a network three times on the test set, and measure how its attention varies over positions.

    Args:
        model: Maps ``(inputs, mask)`` to scores.
        task: Prepared.
        records: Take the first so many; 0 takes all.
        batch: Records at a time.

    Returns:
        "scores" by way, "adds" (what the mean takes away, in the score's unit, positive if attention helps), and of
        each layer how much the output varies: the root mean square of its distance from the sequence's mean, over that
        of its norm.
    """
    objective, test = objective_of(task), task.dataset("test")
    chosen = np.arange(len(test))[: records or None]
    data = LRADataModule(task, DataConfig(), batch_size=batch, seed=0, max_steps=1)
    built_from = getattr(model, "built_from", None)
    causal = built_from is not None and built_from[0].causal
    varied: dict[str, Tensor] = {}
    score, scores = objective.score, {}
    for way in WAYS:

        def count(given: Batch, way: str = way) -> Tensor:
            with _listening(model, partial(_edited, way, causal, varied, given["mask"])):
                return objective.count(scores_of(model, given), given["labels"])

        counts = total(model, data.evaluation(test, chosen), count)
        scores[way] = objective.values(counts.tolist())[score.name]
    sign = 1 if score.best == "max" else -1
    layers = [{"name": name, "varies": (sums[0] / sums[1]).sqrt().item()} for name, sums in varied.items()]
    adds = sign * score.scale * (scores["as it is"] - scores["mean"])
    return {"records": len(chosen), "score": asdict(score), "scores": scores, "adds": adds, "layers": layers}


@contextmanager
def _listening(model: nn.Module, edit: Callable[..., Tensor | None]) -> Iterator[None]:
    """Hand what each layer's attention gives to ``edit``, and go on with what it returns, if anything."""
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if isinstance(module, Attended):
                owner = type(model.get_submodule(path.rpartition(".")[0])).__name__
                place = ".".join(part for part in path.split(".") if part.isdecimal()) or path  # layer, and core of it
                hooks.enter_context(module.register_forward_hook(partial(edit, f"layer {place} {owner}")))
        yield


def _edited(
    way: str, causal: bool, varied: dict[str, Tensor], mask: Tensor | None,
    name: str, module: nn.Module, args: object, output: Tensor,
) -> Tensor | None:  # fmt: skip
    """Return what stands for an attention's output; as it is, only note how it varies over the real positions."""
    if way == "zeros":
        return torch.zeros_like(output)
    o = output.flatten(2).double()
    real = (o.new_ones(o.shape[:2]) if mask is None else mask.double())[..., None]
    mean = (o * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
    if way == "mean":
        if causal:  # the mean of what there is so far: that of the whole would tell of the future
            mean = (o * real).cumsum(1) / real.cumsum(1).clamp(min=1)
        return mean.to(output.dtype).expand(-1, output.shape[1], -1).reshape(output.shape)
    sums = torch.stack([((o - mean).square() * real).sum(), (o.square() * real).sum()])
    varied[name] = varied.get(name, torch.zeros_like(sums)) + sums
    return None


if __name__ == "__main__":
    sys.exit(main())
