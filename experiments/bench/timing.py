"""Timing: all candidates take turns in one process, so that a busy machine slows each alike."""

from __future__ import annotations

import gc
import os
import time
import timeit
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from chela.ops.memory import Workspace
from chela.training.machine import describe, tune_allocator

Step = Callable[[], object]
ALLOCATOR = ("LD_PRELOAD", *(f"MALLOC_{name}" for name in ("MMAP_MAX_", "TRIM_THRESHOLD_", "TOP_PAD_", "ARENA_MAX")))


def clock() -> float:
    """Return seconds, once the GPU, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    candidates: Mapping[str, Step], *, seconds: float = 3.0, least: int = 3, most: int = 50
) -> pd.DataFrame:
    """Time candidates by turns until ``seconds`` per candidate are spent, within ``least`` and ``most`` rounds.

    Returns:
        The seconds that each candidate, a column, took in each round.
    """
    for run in candidates.values():
        run()
    rounds: list[dict[str, float]] = []
    gc.collect()
    start = time.perf_counter()
    while len(rounds) < least or (len(rounds) < most and time.perf_counter() - start < seconds * len(candidates)):
        rounds.append({name: timeit.Timer(run, timer=clock).timeit(1) for name, run in candidates.items()})
    return pd.DataFrame(rounds)


def training_step(
    f: Callable[..., Tensor], *inputs: Tensor, d_out: Tensor, weights: Iterable[Tensor] = ()
) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that runs f forward and backward and returns the gradients of its inputs and weights."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    wanted = [*leaves, *weights]
    return lambda: torch.autograd.grad(f(*leaves), wanted, d_out)


def peak_memory(run: Step) -> int:
    """Return the most bytes that ``run`` held at once beyond what was held before it.

    On a GPU the allocator counts them; on a CPU they are the peak of the profiler's allocation events.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Workspace.release()  # scratch that is kept between calls counts too
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def allocator(keep: bool) -> str:
    """Tune the allocator to keep freed memory if ``keep``, unless the environment sets it; return its name."""
    if any(name in os.environ for name in ALLOCATOR):
        return "as set"
    return "keeping" if keep and tune_allocator() else "default"


def machine() -> dict[str, Any]:
    """Return what a number depends on: hardware, versions, threads, clock, allocator, commit."""
    return {
        **describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0],
        "allocator": {name: os.environ[name] for name in ALLOCATOR if name in os.environ} or "default",
    }
