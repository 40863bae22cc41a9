"""The definition of the short convolution: one shifted product per tap, in float64."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def short_conv_reference(x: Tensor, weight: Tensor, bias: Tensor | None, causal: bool, silu: bool) -> Tensor:
    """Return `(B, L, C)` for x `(B, L, C)`, weight `(C, K)`, bias `(C,)`, in the dtype of x."""
    length, taps = x.shape[1], weight.shape[1]
    left = taps - 1 if causal else (taps - 1) // 2
    padded = F.pad(x.double(), (0, 0, left, taps - 1 - left))
    y = x.double() * 0
    for j in range(taps):
        y = y + padded[:, j : j + length] * weight.double()[:, j]
    if bias is not None:
        y = y + bias.double()
    return (F.silu(y) if silu else y).to(x.dtype)
