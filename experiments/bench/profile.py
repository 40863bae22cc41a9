"""Where a training step's time goes: each operator's share, by PyTorch's profiler; operators that take most first.

The step is that of ``chela bench train``: random records, each as long as the longest to learn from. On a GPU shares
are those of its own time. What the profiler itself costs makes small operators look larger than they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from chela.config import resolve
from chela.core.options import option
from chela.training.machine import hardware
from experiments.bench import Row, timing
from experiments.bench.train import random_records, training_step
from lra.tasks import get_task

STEPS = 4
SHOWN = 25  # operators


@dataclass
class Options:
    """Whose step."""

    task: str = option("listops", "the task")
    model: str = option("chela", "the system")
    preset: str = option("mini", "its size")
    batch: int | None = option(None, "records in a step; null is the recipe's", ge=1)


def run(quick: bool, options: Options) -> list[Row]:
    """Profile a few steps, after as many that are not counted."""
    preset = "tiny" if quick else options.preset
    config = resolve([f"task={options.task}", f"model={options.model}", f"preset={preset}"])
    about, platform = get_task(config.task), hardware(config)
    on_gpu = platform["accelerator"] == "cuda"
    allocator = timing.allocator(keep=not on_gpu)
    size = options.batch or config.trainer.batch_size
    records = random_records(about, size, platform["accelerator"])
    step = partial(training_step(config, about, **platform), *records)
    for _ in range(STEPS):
        step()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    took = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in found.key_averages()
    }
    total = sum(time for time, _ in took.values())
    most = sorted(took.items(), key=lambda item: -item[1][0])[:SHOWN]
    values = {f"{name} [%]": 100 * time / total for name, (time, _) in most}
    values |= {"operators a step": sum(count for _, count in took.values()) / STEPS}
    key = {"task": config.task.name, "preset": preset, "model": config.model.name, "L": about.train_length}
    key |= {"batch": size, "precision": platform["precision"], "allocator": allocator}
    return [Row(key, values | {"a step [ms]": total / STEPS / 1e6})]
