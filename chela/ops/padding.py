"""Set padding to a value row of memory by row: several times as fast as by a mask of elements."""

from __future__ import annotations

import torch
from torch import Tensor


def may_look(x: Tensor) -> bool:
    """Return whether reading values of x is cheap: it is on a CPU, not fake, and no graph is being traced."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def rows_where(absent: Tensor) -> Tensor:
    """Return the indices ``(N,)`` of the True elements of ``absent: (…)`` bool, flattened. This waits for a GPU."""
    return absent.flatten().nonzero().squeeze(1)


def fill_rows_(x: Tensor, rows: Tensor, value: float) -> Tensor:
    """Set the given rows of x ``(…, C)``, seen as ``(-1, C)``, to a value, in place.

    >>> fill_rows_(torch.ones(2, 2, 3), rows_where(torch.tensor([[False, True], [False, False]])), 0)[0].tolist()
    [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    """
    if x.is_contiguous():
        x.view(-1, x.shape[-1]).index_fill_(0, rows, value)
    else:
        x[torch.unravel_index(rows, x.shape[:-1])] = value
    return x
