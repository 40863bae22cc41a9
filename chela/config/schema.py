"""Every option of a run, typed, with its default, its bounds and its meaning.

The options of a task are the fields of its class (``lra.tasks``), those of a system the keyword arguments of its
constructor (``chela.layers.mixers``).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from chela.core.errors import UsageError
from chela.core.options import Field, option, shown
from lra.source import DataConfig

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: 0.5 * (1 - math.cos(math.pi * left)),
    "cosine_tenth": lambda left: 0.1 + 0.45 * (1 - math.cos(math.pi * left)),
    "constant": lambda left: 1.0,
}
"""Share of the peak rate, given the share of the steps after the warm-up that is left; a new one is a line here."""


@dataclass
class ModelConfig:
    """The backbone; the same for every system."""

    name: str = option("chela", "the row of the table: a file in configs/model/")
    mixer: Any = None
    d_model: int = option(64, "width of the residual stream", ge=1, le=8192)
    depth: int = option(4, "blocks", ge=1, le=256)
    d_ff: int = option(128, "hidden width of the feed-forward layers; 0: none", ge=0, le=65536)
    dropout: float = option(0.0, "on the update of each layer; MEGA uses 0.1 on ListOps and the text tasks", ge=0, lt=1)
    norm: str = option("layer", "normalisation of the blocks", choices=("layer", "scale", "rms", "batch"))
    prenorm: bool = option(True, "normalise before each layer; false: after the residual sum")
    positions: str = option("none", "added to the embedding; rotary needs none", choices=("none", "learned"))
    causal: bool = option(False, "no position sees a later one; LRA's tasks are bidirectional")
    d_head: int = option(128, "hidden width of the classifier; 0 is a linear one", ge=0, le=65536)
    pair_features: str = option("nli", "of two documents: nli is [a, b, a-b, a*b]", choices=("nli", "concat"))


@dataclass
class OptimizerConfig:
    """AdamW with warm-up."""

    lr: float = option(2e-3, "peak learning rate", gt=0, le=10)
    kernel_lr: float = option(1e-3, "peak learning rate of the long kernels", gt=0, le=10)
    weight_decay: float = option(0.01, "not applied to norms, biases, scales and shifts", ge=0, le=10)
    kernel_weight_decay: float | None = option(None, "of the long kernels; null: the same", neutral=None, ge=0, le=10)
    beta1: float = option(0.9, "Adam's first moment", ge=0, lt=1)
    beta2: float = option(0.98, "Adam's second moment", ge=0, lt=1)
    eps: float = option(1e-8, "Adam's denominator", gt=0, le=1)
    warmup_steps: int = option(100, "linear warm-up from 0", ge=0, le=100_000_000)
    schedule: str = option("linear", "after the warm-up: to 0, to a tenth, or constant", choices=tuple(SCHEDULES))
    clip: float = option(1.0, "largest gradient norm; 0 does not clip", ge=0, le=1e9)

    def lr_factor(self, step: int, max_steps: int) -> float:
        """Return the share of the peak rate at ``step`` (from 0): a pure function, so that nothing has to be restored.

        >>> config = OptimizerConfig(warmup_steps=10, schedule="linear")
        >>> [round(config.lr_factor(step, 110), 2) for step in (0, 9, 10, 60, 109)]
        [0.1, 1.0, 1.0, 0.5, 0.01]
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return SCHEDULES[self.schedule]((max_steps - step) / max(1, max_steps - self.warmup_steps))


@dataclass
class TrainerConfig:
    """How long, on what, and how often to look and to save."""

    max_steps: int = option(1000, "optimiser steps of the whole run", ge=1, le=100_000_000)
    max_time: str = option("", "limit of this launch, e.g. 30s, 9m, 11h or 2d; empty: none", identity=False)
    batch_size: int = option(64, "sequences in a step, over all processes together", ge=1, le=1_000_000)
    accumulate: int = option(1, "parts that a batch is taken in, to save memory", neutral=1, ge=1, le=1_000_000)
    checkpoint_activations: bool = option(False, "recompute blocks in the backward pass: less memory", neutral=False)
    eval_batch_size: int = option(128, "sequences in an evaluation step", ge=1, le=1_000_000)
    val_every: int = option(200, "validate every so many steps", ge=1, le=100_000_000)
    checkpoint_every: int = option(200, "save every so many steps", ge=1, le=100_000_000, identity=False)
    checkpoint_minutes: float = option(10.0, "and every so many minutes", gt=0, le=1e6, identity=False)
    log_every: int = option(10, "a line in metrics.csv every so many steps", ge=1, le=100_000_000, identity=False)
    accelerator: str = option("auto", "where to run", choices=("auto", "cpu", "gpu"))
    devices: int = option(1, "processes (one per GPU, or so many on the CPU) on each node", ge=1, le=1024)
    num_nodes: int = option(1, "nodes", ge=1, le=4096)
    sequence_parallel: int = option(1, "processes that share each sequence (docs/scale.md)", neutral=1, ge=1, le=4096)
    test: bool = option(True, "score the test set at the end; false keeps it unseen", identity=False)
    precision: str = option("auto", "auto: bf16-mixed on a GPU", choices=("auto", "32-true", "bf16-mixed", "64-true"))
    compile: bool = option(False, "torch.compile the model")
    matmul: str = option(
        "auto",
        "whose products a CPU takes; auto: onednn where it is faster and as exact (docs/speed.md)",
        choices=("auto", "mkl", "onednn"),
        neutral="auto",
    )
    threads: int = option(0, "CPU threads of a process; 0 leaves torch's choice", ge=0, le=1024)
    progress: str = option("auto", "auto: one place in a terminal", choices=("auto", "plain", "none"), identity=False)


@dataclass
class Config:
    """One run."""

    task: Any = None
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    preset: str = option("auto", "full: LRA's task to the letter; lite: in short; mini: a laptop's; tiny: a smoke run")
    edition: int = option(1, "of the mini tasks; a table never holds two", neutral=1, ge=1, le=1000)
    seed: int = option(0, "initial values, data order and dropout follow from it", ge=0, le=2**31 - 1)
    runs: str = option("runs", "folder in which the run folders lie", identity=False)
    resume: str = option("none", "auto: go on if it was begun; or a run's folder; last: the newest run", identity=False)
    weights: str = option("", "a run, or weights that have a name, to begin with (docs/weights.md)", neutral="")
    config: str = option("", "a config.yaml, or runs.jsonl:RUN: as that run was, but for other words", identity=False)
    again: bool = option(False, "make a run anew that is there, finished", identity=False)
    allocator: bool = option(True, "on Linux CPUs malloc keeps freed memory: about 20 % faster", identity=False)
    tensorboard: bool = option(True, "also log to TensorBoard when it is installed", identity=False)
    wandb: bool = option(False, "log to Weights & Biases (extra wandb); WANDB_MODE=offline: no account", identity=False)
    trust: str = option("", "modules that a run folder may name, separated by commas", identity=False)


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Field]]:
    """Walk over ``(dotted key, value, field)`` of a configuration's leaves."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item


def values(config: Any) -> dict[str, Any]:
    """Return a configuration's values by dotted key."""
    return {key: value for key, value, _ in fields(config)}


def seconds(duration: str) -> float | None:
    """Read ``9m`` or ``1h30m`` as seconds; an empty string is no limit (None)."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", duration)
    if "".join(number + unit for number, unit in parts) != duration:
        raise UsageError(f"trainer.max_time: expected a time such as 30s, 9m, 1h30m or 2d, got {shown(duration)}")
    total = sum(float(number) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit] for number, unit in parts)
    return total if duration else None
