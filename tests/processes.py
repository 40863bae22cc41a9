"""The same function in several processes that know each other (gloo), and what each of them returns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from tests.training.launches import FORKS


def in_processes(count: int, folder: Path, function: Callable[..., Any], *given: Any) -> list[Any]:
    """Call ``function(*given)`` in each of ``count`` processes; return the results, tensors among them, by rank."""
    all_of_them = [FORKS.Process(target=_one, args=(rank, count, folder, function, given)) for rank in range(count)]
    for process in all_of_them:
        process.start()
    for process in all_of_them:
        process.join(300)
    ended = [process.exitcode for process in all_of_them]
    for process in all_of_them:
        process.kill()
    assert ended == [0] * count, f"exit statuses {ended}; None: it hangs"
    return [torch.load(folder / f"{count}.{rank}", weights_only=True) for rank in range(count)]


def _one(rank: int, count: int, folder: Path, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{count}.met", rank=rank, world_size=count)
    torch.save(function(*given), folder / f"{count}.{rank}")
    dist.barrier()
    dist.destroy_process_group()
