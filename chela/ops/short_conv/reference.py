"""The definition of the short convolution: one shifted product per tap."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.ops.backend import accumulation_dtype


def short_conv_reference(x: Tensor, weight: Tensor, left: int, silu: bool) -> Tensor:
    """Return ``(B, L, C)`` in the dtype of x, computed in at least float32.

    Args:
        x: ``(B, L, C)``.
        weight: ``(C, K)``.
        left: Taps before the position they contribute to: K − 1 when causal, else (K − 1)//2.
        silu: Whether SiLU follows.
    """
    dtype, length, taps = accumulation_dtype(x.dtype, weight.dtype), x.shape[1], weight.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        padded, weight = F.pad(x.to(dtype), (0, 0, left, taps - 1 - left)), weight.to(dtype)
        y = padded[:, :length] * weight[:, 0]
        for tap in range(1, taps):
            y = y + padded[:, tap : tap + length] * weight[:, tap]
        return (F.silu(y) if silu else y).to(x.dtype)
