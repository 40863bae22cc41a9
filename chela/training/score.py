"""The one way to score: what a step counts, summed over batches, groups and processes.

Validation and test of a run, ``chela evaluate``, ``predict`` and ``probe`` all go through ``over_batches``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from chela.config.schema import Config
from chela.core.errors import UsageError
from chela.training.machine import hardware, quiet_lightning
from chela.training.objectives import Counts, Objective, Score
from chela.training.run import RunFolder
from chela.training.step import LitModel
from lra.batches import Batch
from lra.datamodule import LRADataModule

T = TypeVar("T")


@torch.no_grad()
def over_batches(
    model: nn.Module, batches: Iterable[Batch], step: Callable[[Batch], T], fabric: Fabric | None = None
) -> Iterator[T]:
    """Yield what ``step`` makes of each batch, with ``model`` in eval mode and without gradients.

    Batches are moved to the device of ``fabric`` (None: the CPU) and computed in its precision.
    """
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in batches:
            with fabric.autocast():
                made = step(fabric.to_device(batch))
            yield made
    finally:
        for module, mode in modes.items():  # a frozen one stays frozen
            module.training = mode


def sum_counts(
    model: nn.Module, batches: Iterable[Batch], step: Callable[[Batch], Tensor], fabric: Fabric | None = None
) -> Tensor:
    """Return the sum, over batches and processes, of what ``step`` counts in each: float64, on the CPU."""
    counted = Counts()
    for counts in over_batches(model, batches, step, fabric):
        counted.update(counts)
    sums: Tensor = counted.compute()
    return sums.cpu()


def score_split(module: LitModel, data: LRADataModule, split: str, fabric: Fabric) -> dict[str, Any]:
    """Score a network on "validation", "test" or a further test set.

    Returns the objective's columns with "count", the number of targets; of a test set whose records are grouped also
    "by_…", the same of each group.
    """
    records, validates = data.records(split), split == "validation"
    groups = None if validates else records.groups()
    module.groups = [] if groups is None else sorted(set(groups.tolist()))  # all: every process sums the same
    step = module.validation_step if validates else module.test_step
    whole, *parts = sum_counts(module, data.evaluation(records), lambda batch: step(batch, 0), fabric).tolist()
    values = module.objective.values
    by = {group: values(part) for group, part in zip(module.groups, parts, strict=True)}
    return values(whole) | ({f"by_{data.task.grouped_by}": by} if by else {})


def data_of(config: Config) -> LRADataModule:
    """Return the data of a run."""
    names = ("batch_size", "eval_batch_size", "max_steps", "accumulate")
    sizes = {name: getattr(config.trainer, name) for name in names}
    sizes["pieces"] = config.trainer.sequence_parallel
    return LRADataModule(config.task, config.data, seed=config.seed, **sizes)


def evaluate(config: Config, run: RunFolder, which: str, split: str) -> tuple[Score, dict[str, Any]]:
    """Score a run's "best" or "last" weights on "test", "validation" or a further test set: the run's own number.

    With the score that counts come the objective's columns and "count", the targets; of a text also ``text_facts``.
    """
    quiet_lightning()
    trained, config = config, copy.deepcopy(config)
    config.trainer.sequence_parallel = 1
    if config.trainer.accelerator == "gpu":  # that was for training; without one the weights are scored all the same
        config.trainer.accelerator = "auto"
    data = data_of(config)
    data.prepare_data()
    if split not in (known := ("test", "validation", *data.task.further)):
        raise UsageError(f"split: expected {' or '.join(known)}, got {split}")
    fabric = Fabric(**hardware(config), devices=1)
    module = LitModel(run.network(trained, data.task, which), Objective(data.task), config)
    fabric.setup_module(module)
    values = score_split(module, data, split, fabric)
    return module.objective.score, values | text_facts(data.task, config.data.split(split), values)


def text_facts(task: Any, split: str, values: dict[str, float]) -> dict[str, Any]:
    """Return what is facts of a text beside the columns; nothing for another task."""
    if not task.in_order:
        return {}
    facts: dict[str, Any] = {"perplexity": math.exp(values["loss"]), "context": task.context}
    if words := task.words(split):
        nats = values["loss"] * values["count"]
        facts |= {"words": words, "word_perplexity": math.exp(min(nats / words, 700.0))}
    return facts


def overlapping(data: LRADataModule, model: nn.Module, split: str, window: int) -> Iterable[Batch]:
    """Return windows of a text that overlap by half; a symbol counts in the first that has it.

    UsageError where they are longer than in training, and the network cannot read on from a state.
    """
    task: Any = data.task
    records = task.pieces(split, window, max(1, window // 2))
    if window <= task.l_max:
        return data.evaluation(records)
    expect_prefill(model, f"window {window}")
    data = copy.copy(data)  # a copy: the smaller batches are for these windows alone
    data.eval_batch_size = max(1, data.eval_batch_size * task.l_max // window)
    return ({**batch, "beyond": True} for batch in data.evaluation(records))


def expect_prefill(model: nn.Module, key: str) -> None:
    """Refuse a network that cannot read on from a state for longer than it was built for, by a UsageError."""
    if not hasattr(model, "prefill"):
        raise UsageError(f"{key}: expected a network with prefill(inputs, state), {type(model).__name__} has none")
    if ends := getattr(getattr(model, "backbone", None), "ends", str)():  # "learned positions", or a system
        raise UsageError(f"{key}: expected a system that reads on after the training window, {ends} ends there")
