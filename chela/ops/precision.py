"""In which dtype the ops compute and keep their sums."""

from __future__ import annotations

import functools

import torch


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype that holds sums over inputs of these dtypes: at least float32; float64 stays float64.

    >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float32, torch.float64)
    (torch.float32, torch.float64)
    """
    return functools.reduce(torch.promote_types, dtypes, torch.float32)
