"""How things are timed here: all candidates in one process, taking turns, so that a noisy machine is unfair to none."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from chela.ops.memory import Workspace
from chela.training.machine import describe

ALLOCATOR_VARIABLES = (
    "LD_PRELOAD",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_ARENA_MAX",
)


@dataclass(frozen=True)
class Timing:
    """Times of one candidate, in seconds.

    Attributes:
        median: Over all rounds.
        best: The fastest round.
        spread: Distance of the quartiles over the median.
        rounds: How many rounds were timed.
    """

    median: float
    best: float
    spread: float
    rounds: int


# What is read around a run: the wall clock, or the CPU seconds of this process (``--cpu-time``).
clock: Callable[[], float] = time.perf_counter


def use_cpu_time() -> None:
    """Count CPU seconds from now on: what one thread's work costs, also on a machine that others keep busy."""
    global clock
    clock = time.process_time


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, seconds: float = 3.0, least: int = 3, most: int = 50
) -> dict[str, Timing]:
    """Time candidates by turns until ``seconds`` per candidate are spent, within ``least`` and ``most`` rounds."""
    for run in candidates.values():
        run()
    synchronize()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    start = time.perf_counter()
    for turn in range(most):
        for name, run in candidates.items():
            began = clock()
            run()
            synchronize()
            times[name].append(clock() - began)
        if turn + 1 >= least and time.perf_counter() - start > seconds * len(candidates):
            break
    return {name: _summary(t) for name, t in times.items()}


def _summary(times: list[float]) -> Timing:
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4)
    return Timing(median, min(times), (high - low) / median, len(times))


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], object]) -> int:
    """Return the most bytes that ``run`` held at once beyond what was held before it.

    On a CUDA device the allocator's own count; else the peak of the profiler's allocation events.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize()
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


def machine() -> dict[str, Any]:
    """Return what a number depends on: hardware, versions, allocator, threads, commit."""
    return {
        **describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0],
        "clock": clock.__name__,
        "allocator": {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ} or "default",
    }


def record(timing: Timing) -> dict[str, Any]:
    """Return a timing as plain data."""
    return asdict(timing)
