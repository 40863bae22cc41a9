"""The long convolution in short: the kernel on a circle, and the convolution theorem."""

from __future__ import annotations

import torch
from torch import Tensor

from chela.ops.precision import accumulation_dtype


def fft_conv_plain(u: Tensor, kernel: Tensor, kernel_back: Tensor, skip: Tensor | None) -> Tensor:
    """Return ``(B, L, C)`` in the dtype of u; the arguments are those of ``fft_conv_reference``."""
    length, dtype = u.shape[1], accumulation_dtype(u.dtype, kernel.dtype)
    kernel, kernel_back = crop(kernel, kernel_back, length)
    n = fft_length(length, kernel.shape[1], kernel_back.shape[1])
    with torch.autocast(u.device.type, enabled=False):
        circle = on_circle(torch.zeros(len(kernel), n, dtype=dtype, device=u.device), kernel, kernel_back, skip)
        spectrum = torch.fft.rfft(u.mT.to(dtype), n=n) * torch.fft.rfft(circle)
        y: Tensor = torch.fft.irfft(spectrum, n=n)[..., :length].mT
        return y.to(u.dtype)


def fft_length(length: int, taps: int, taps_back: int) -> int:
    """Return a fast FFT length that keeps what wraps around out of the first ``length`` outputs.

    Output t and input j meet at lag t − j, |t − j| < length, and circularly at t − j ± N. No second meeting falls on a
    tap as long as N ≥ length + max(taps − 1, taps_back). Of the lengths 2^a·{1, 3, 5, 9, 15} the smallest is taken.

    >>> fft_length(1000, 1000, 999), fft_length(1000, 5, 0), fft_length(1, 1, 0)
    (2048, 1024, 2)
    """
    least = max(length + max(taps - 1, taps_back), 2)
    return min(odd << max(-(-least // odd) - 1, 1).bit_length() for odd in (1, 3, 5, 9, 15))


def crop(kernel: Tensor, kernel_back: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Leave out the lags that no two positions of the sequence have."""
    return kernel[:, :length], kernel_back[:, : length - 1]


def on_circle(circle: Tensor, kernel: Tensor, kernel_back: Tensor, skip: Tensor | None) -> Tensor:
    """Put the kernel on a circle ``(C, N)`` of zeros, in place: lag s at s, lag −s at N − s, the skip on lag 0."""
    circle[:, : kernel.shape[1]] = kernel
    if kernel_back.shape[1]:
        circle[:, circle.shape[1] - kernel_back.shape[1] :] = kernel_back.flip(1)
    if skip is not None:
        circle[:, 0] += skip
    return circle
