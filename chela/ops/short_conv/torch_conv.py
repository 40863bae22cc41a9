"""The short convolution on any device, by PyTorch's depthwise convolution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def short_conv_torch(x: Tensor, weight: Tensor, bias: Tensor | None, causal: bool, silu: bool) -> Tensor:
    """Return `(B, L, C)` for x `(B, L, C)`, weight `(C, K)`, bias `(C,)`, in the dtype of x.

    A `(B, L, C)` tensor *is* a channels-last image `(B, C, 1, L)`, so the 2-d convolution reads and writes it where it
    lies; a 1-d convolution would transpose it twice and takes up to 25 times as long forward and backward.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    length, taps = x.shape[1], weight.shape[1]
    pad = taps - 1 if causal else taps // 2
    with torch.autocast(x.device.type, enabled=False):
        image = x.to(dtype).transpose(1, 2).unsqueeze(2)
        y = F.conv2d(
            image,
            weight.to(dtype)[:, None, None],
            None if bias is None else bias.to(dtype),
            padding=(0, pad),
            groups=x.shape[2],
        )
        # causal: the right padding only adds outputs beyond the end; same with an even size: one at the front.
        start = 0 if causal or taps % 2 else 1
        y = y.squeeze(2).transpose(1, 2)[:, start : start + length]
        return (F.silu(y) if silu else y.contiguous()).to(x.dtype)
