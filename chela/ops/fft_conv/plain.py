"""The long convolution in short: its lags in order, and the convolution theorem."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.ops.backend import accumulation_dtype


def fft_conv_plain(u: Tensor, kernel: Tensor, kernel_back: Tensor, skip: Tensor | None) -> Tensor:
    """Return ``(B, L, C)`` in the dtype of u; the arguments are those of ``fft_conv_reference``."""
    length, dtype = u.shape[1], accumulation_dtype(u.dtype, kernel.dtype)
    with torch.autocast(u.device.type, enabled=False):
        lags = in_order(kernel, kernel_back, skip, length).to(dtype)
        n = fft_length(length)
        y: Tensor = torch.fft.irfft(torch.fft.rfft(u.mT.to(dtype), n=n) * torch.fft.rfft(lags, n=n), n=n)
        return y[..., lags.shape[1] - length : lags.shape[1]].mT.to(u.dtype)


def in_order(kernel: Tensor, kernel_back: Tensor, skip: Tensor | None, length: int) -> Tensor:
    """Return all lags that two positions of a sequence can have: 0, 1, …, L − 1 ``(C, L)``, after −(L − 1), …, −1.

    That is ``(C, 2·L − 1)``; without ``kernel_back`` it is ``(C, L)``. The skip is added to lag 0.
    """
    kernel, kernel_back = (x.to(accumulation_dtype(x.dtype)) for x in (kernel, kernel_back))
    forward, least = kernel[:, :length], max(length - 1, 0)
    forward = F.pad(forward, (0, length - forward.shape[1]))
    if skip is not None:
        forward = torch.cat([forward[:, :1] + skip[:, None], forward[:, 1:]], dim=1)
    if not kernel_back.shape[1]:
        return forward
    back = kernel_back[:, :least].flip(1)
    return torch.cat([F.pad(back, (least - back.shape[1], 0)), forward], dim=1)


def fft_length(length: int) -> int:
    """Return a fast FFT length that keeps what wraps around out of the first ``length`` outputs.

    Output t and input j meet at lag t − j, |t − j| < length, and circularly at t − j ± N: that is no other lag as long
    as N ≥ 2·length − 1. Of the lengths 2^a·{1, 3, 5, 9, 15} the smallest is taken.

    >>> fft_length(1000), fft_length(96), fft_length(1)
    (2048, 192, 2)
    """
    least = max(2 * length - 1, 2)
    return min(odd << max(-(-least // odd) - 1, 1).bit_length() for odd in (1, 3, 5, 9, 15))
