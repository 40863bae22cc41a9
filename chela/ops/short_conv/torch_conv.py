"""The short convolution on any device, by PyTorch's depthwise convolution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def short_conv_torch(x: Tensor, weight: Tensor, bias: Tensor | None, causal: bool, silu: bool) -> Tensor:
    """Return `(B, L, C)` for x `(B, L, C)`, weight `(C, K)`, bias `(C,)`, in the dtype of x.

    Run eagerly, a `(B, L, C)` tensor *is* a channels-last image `(B, C, 1, L)`, so the 2-d convolution reads and
    writes it where it lies; a 1-d convolution would transpose it twice and takes up to 25 times as long forward and
    backward.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        convolve = _sum_of_taps if torch.compiler.is_compiling() else _as_image
        y = convolve(x.to(dtype), weight.to(dtype), causal)
        y = y if bias is None else y + bias.to(dtype)
        return (F.silu(y) if silu else y.contiguous()).to(x.dtype)


def _as_image(x: Tensor, weight: Tensor, causal: bool) -> Tensor:
    length, taps = x.shape[1], weight.shape[1]
    pad = taps - 1 if causal else taps // 2
    y = F.conv2d(x.transpose(1, 2).unsqueeze(2), weight[:, None, None], padding=(0, pad), groups=x.shape[2])
    # causal: the right padding only adds outputs beyond the end; same with an even size: one at the front.
    start = 0 if causal or taps % 2 else 1
    return y.squeeze(2).transpose(1, 2)[:, start : start + length]


def _sum_of_taps(x: Tensor, weight: Tensor, causal: bool) -> Tensor:
    """The same by shifted products: the compiler makes one loop of them, but no layout of an unknown length."""
    length, taps = x.shape[1], weight.shape[1]
    left = taps - 1 if causal else (taps - 1) // 2
    padded = F.pad(x, (0, 0, left, taps - 1 - left))
    y = padded[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        y = y + padded[:, tap : tap + length] * weight[:, tap]
    return y
