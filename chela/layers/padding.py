"""Padding is absent: zero wherever tokens meet."""

from __future__ import annotations

import torch
from torch import Tensor

from chela.ops.padding import rows_where


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set ``x: (..., C)`` to 0 where ``mask: (...)`` is False; None means all tokens are real.

    Whatever stood there, infinities included, is gone.
    """
    if mask is None:
        return x
    if not may_look(x):
        return x.masked_fill(~mask.unsqueeze(-1), 0.0)
    rows = rows_where(~mask)
    return x.flatten(0, -2).index_fill(0, rows, 0.0).view_as(x) if len(rows) else x


def may_look(x: Tensor) -> bool:
    """Whether Python may read values of x at no cost: it is on a CPU, not fake, and no graph is being traced."""
    return x.device.type == "cpu" and type(x) is torch.Tensor and not torch.compiler.is_compiling()
