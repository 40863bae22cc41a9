"""What the processes of one run agree on: torchrun or Lightning started them, and each knows its own part only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import lightning as L
import torch

from chela.errors import UsageError

T = TypeVar("T")


def in_first(trainer: L.Trainer, work: Callable[[], T]) -> T | None:
    """Do ``work`` in process 0 and return in every process what it returns.

    Raises:
        UsageError, OSError: What ``work`` raises; in the other processes always a UsageError. Without being told, they
            would wait for process 0 for ever.
    """
    result: T | None = None
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            result = work()
        except (UsageError, OSError) as problem:
            error = problem
    result, told = trainer.strategy.broadcast((result, None if error is None else str(error)))
    if told is not None:
        raise error or UsageError(told)
    return result


def agree(trainer: L.Trainer, due: bool, asked: int) -> tuple[bool, int]:
    """Save when process 0 wants to, stop when any process is asked to; all of them at the same step."""
    if trainer.world_size == 1:
        return due, asked
    row = torch.tensor([int(due and trainer.is_global_zero), asked], device=trainer.strategy.root_device)
    torch.distributed.all_reduce(row, op=torch.distributed.ReduceOp.MAX)
    return bool(row[0]), int(row[1])
