"""Whole training steps: every system (``configs/model``) at each task's shape, mini and full, against softmax.

Forward, loss, backward, clipping and AdamW of the real model on random records, each as long as the task's longest: no
data is needed. Precision and allocator are those of ``chela.train``. At full a CPU takes one record, a GPU the recipe's
batch. Memory is what a step holds beyond weights and Adam's moments.

``python -m experiments.bench train task=text,image model=chela,softmax preset=full batch=4 --out FILE`` narrows it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from chela.config import names, resolve
from chela.errors import UsageError
from chela.models import build_model
from chela.schema import Config
from chela.training.hardware import hardware
from chela.training.machine import tune_allocator
from chela.training.optim import build_optimizer, lr_factor
from experiments.bench import timing
from experiments.bench.registry import Row
from experiments.bench.timing import Timing, interleaved, peak_memory, record
from lra.schema import TASKS
from lra.tasks import get_task

RIVAL = "softmax"
LONGEST_STEP = 6.0  # seconds, on a CPU; what may take longer is not begun
Step = Callable[[int], None]


def run(quick: bool, *, task: str = "", model: str = "", preset: str = "", batch: str = "") -> list[Row]:
    """Measure every task at every preset; the words, split by commas, choose some of them, ``batch`` another size.

    Raises:
        ValueError: A name or a size that there is not.
    """
    tasks = _chosen("task", task, ["listops"] if quick else list(TASKS))
    presets = _chosen("preset", preset, ["tiny"] if quick else ["mini", "full"])
    models = _chosen("model", model, names("model"))
    if batch and not (batch.isdecimal() and int(batch) > 0):
        raise ValueError(f"batch: expected a number of records, got {batch!r}")
    allocator = "keeping" if not torch.cuda.is_available() and tune_allocator() else "default"
    seconds = 0.05 if quick else 1.0
    try:
        return [
            task_row(name, size, models, int(batch or 0), {"allocator": allocator}, seconds)
            for size in presets
            for name in tasks
        ]
    except UsageError as error:
        raise ValueError(str(error)) from None


def _chosen(word: str, given: str, default: list[str]) -> list[str]:
    known = {"task": list(TASKS), "preset": names("preset"), "model": names("model")}[word]
    found = given.split(",") if given else default
    for name in found:
        if name not in known:
            raise ValueError(f"{word}: expected some of {', '.join(known)}, got {name!r}")
    return found


def task_row(task: str, preset: str, models: list[str], batch: int, facts: dict[str, Any], seconds: float) -> Row:
    """Measure all systems on one task by turns; what cannot be is named in the note.

    Args:
        task: Its name.
        preset: Its sizes.
        models: Names of systems.
        batch: Records in a step; 0: the recipe's, on a CPU at full one.
        facts: What else the key of the row says.
        seconds: To spend on each system.
    """
    configs = {name: resolve([f"task={task}", f"preset={preset}", f"model={name}"]) for name in models}
    shape, platform = next(iter(configs.values())), hardware(next(iter(configs.values())))
    on_gpu = platform["accelerator"] == "cuda"
    size = batch or (1 if preset == "full" and not on_gpu else shape.trainer.batch_size)
    about = get_task(shape.task)
    records = random_records(about, size, platform["accelerator"])
    tokens = records[0].shape[0] * about.l_max

    steps: dict[str, Callable[[], None]] = {}
    memory: dict[str, int] = {}
    notes = []
    for name, config in configs.items():
        step = training_step(config, about, records, platform)
        refused = "" if on_gpu else too_much(step, about.l_max)
        if not refused:
            whole = partial(step, about.l_max)
            try:
                whole()  # Adam's moments are there from here on
                memory[name], steps[name] = peak_memory(whole), whole
            except torch.OutOfMemoryError:
                refused = f"{size} records do not fit into the GPU's memory; try a smaller batch=N"
        if refused:
            notes.append(f"{task} {preset} {name} not run: {refused}")
    times = interleaved(steps, seconds=seconds, least=3) if steps else {}
    key = {
        "task": task,
        "preset": preset,
        "L": about.l_max,
        "batch": size,
        "recipe's batch": shape.trainer.batch_size,
        "precision": platform["precision"],
        **facts,
    }
    return Row(key, values(times, memory, tokens), "; ".join(notes), {name: record(t) for name, t in times.items()})


def values(times: dict[str, Timing], memory: dict[str, int], tokens: int) -> dict[str, float]:
    """Return times, rates and memory, then both against softmax where that was measured."""
    found = {f"{name} [ms]": t.median for name, t in times.items()}
    found |= {f"{name} [tokens/s]": tokens / t.median for name, t in times.items()}
    found |= {f"{name} [MiB]": memory[name] / 2**20 for name in times}
    if RIVAL in times:
        rivals = [name for name in times if name != RIVAL]
        found |= {f"speed, {name} / {RIVAL}": times[RIVAL].median / times[name].median for name in rivals}
        found |= {f"memory, {name} / {RIVAL}": memory[name] / memory[RIVAL] for name in rivals}
    return found


def random_records(about: Any, size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs `(B, L)` or `(B, L, F)`, of pairs `2B` rows, and labels `(B,)`, in the form of ``about``."""
    torch.manual_seed(0)
    rows = 2 * size if about.pair else size
    if about.vocab_size is None:
        inputs = torch.randn(rows, about.l_max, about.input_dim, device=device)
    else:
        inputs = torch.randint(1, about.vocab_size, (rows, about.l_max), device=device)
    return inputs, torch.randint(about.num_classes, (size,), device=device)


def training_step(
    config: Config, about: Any, records: tuple[torch.Tensor, torch.Tensor], platform: dict[str, Any]
) -> Step:
    """Return a step of the run's own model and optimiser on the first so many positions of the records."""
    device = platform["accelerator"]
    model = build_model(config.model, about, 0).to(device).train()
    optimizer = build_optimizer(model, config.optimizer)
    for group in optimizer.param_groups:  # as in the first step of the warm-up
        group["lr"] = group["peak_lr"] * lr_factor(config.optimizer, 0, config.trainer.max_steps)
    inputs, labels = records
    mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=device)

    def step(length: int) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=platform["precision"] == "bf16-mixed"):
            loss = F.cross_entropy(model(inputs[:, :length], mask[:, :length]), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    return step


def too_much(step: Step, length: int) -> str:
    """Climb to ``length`` by doublings and say why to stop before it, or nothing.

    A step of twice the tokens takes and holds at most four times as much: no system is more than quadratic.
    """
    room = memory_of_machine()
    step(length // 8)  # first calls of torch's kernels, Adam's moments
    for part in (8, 4, 2):
        shorter = length // part
        began = timing.clock()
        step(shorter)
        took = timing.clock() - began
        if 4 * took > LONGEST_STEP:
            return (
                f"a step of {shorter} tokens a sequence took {took:.2f} s, one of twice as many may take four times "
                f"that, and the limit on a CPU is {LONGEST_STEP:.0f} s"
            )
        held = peak_memory(partial(step, shorter))
        if 4 * held > room:
            return (
                f"a step of {shorter} tokens a sequence held {held / 2**30:.1f} GiB, one of twice as many may hold "
                f"four times that, and this machine has {room / 2**30:.0f} GiB"
            )
    return ""


def memory_of_machine() -> int:
    """Return the bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
