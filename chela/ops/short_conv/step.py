"""One step of the causal short convolution: the last K inputs are all it remembers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def short_conv_step(x: Tensor, weight: Tensor, recent: Tensor, *, silu: bool = False) -> tuple[Tensor, Tensor]:
    """Feed one token to the causal short convolution; equal to the same position of ``short_conv``. O(B·C·K).

    Args:
        x: ``(B, C)``.
        weight: ``(C, K)``.
        recent: ``(B, K, C)``, the last K inputs, zeros before the first token; in at least float32.
        silu: Whether SiLU is applied to the result.

    Returns:
        The output ``(B, C)`` in the dtype of x, and the new ``recent``.

    >>> recent = torch.zeros(1, 3, 1)
    >>> for token in (1.0, 0.0, 0.0):
    ...     y, recent = short_conv_step(torch.tensor([[token]]), torch.tensor([[1.0, 2.0, 3.0]]), recent)
    ...     print(y.item())
    3.0
    2.0
    1.0
    """
    recent = torch.cat([recent[:, 1:], x[:, None].to(recent)], dim=1)
    y = (recent * weight.T).sum(1)
    return (F.silu(y) if silu else y).to(x.dtype), recent
