"""The short convolution in short: PyTorch's own, with a group for every channel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.ops.backend import accumulation_dtype


def short_conv_plain(x: Tensor, weight: Tensor, left: int, silu: bool) -> Tensor:
    """Return ``(B, L, C)`` in the dtype of x; the arguments are those of ``short_conv_reference``."""
    channels, taps = weight.shape
    dtype = accumulation_dtype(x.dtype, weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        padded = F.pad(x.to(dtype).mT, (left, taps - 1 - left))  # (B, C, K − 1 + L)
        y = F.conv1d(padded, weight.to(dtype)[:, None], groups=channels).mT
        return (F.silu(y) if silu else y).to(x.dtype).contiguous()
