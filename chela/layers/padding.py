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
    if x.device.type != "cpu" or type(x) is not torch.Tensor or torch.compiler.is_compiling():  # a fake one has no rows
        return x.masked_fill(~mask.unsqueeze(-1), 0.0)
    rows = rows_where(~mask)
    return x.flatten(0, -2).index_fill(0, rows, 0.0).view_as(x) if len(rows) else x
