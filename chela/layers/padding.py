"""Padding is absent: zero wherever tokens meet."""

from __future__ import annotations

from torch import Tensor


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set ``x: (..., C)`` to 0 where ``mask: (...)`` is False; None means all tokens are real.

    Whatever stood there, infinities included, is gone.
    """
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)
