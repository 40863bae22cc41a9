"""The long convolution by real FFTs, with a backward of its own.

Everything runs in blocks of channels, so that the padded copies and the spectra of one block stay in the cache and the
memory needed beside inputs and outputs is that of one block. Complex tensors never leave this file.

Shapes: B batch, L length, C channels, K taps, N FFT length, F = N//2 + 1 frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 20
"""Aim for the padded input of one block of channels, on a CPU: it and its spectrum then fit the second-level cache."""


def fft_length(length: int, taps: int, taps_back: int) -> int:
    """Return an FFT length that keeps the wrapped-around part out of the first `length` outputs, and that is fast.

    Output t and input j meet at lag t − j, |t − j| < length, and circularly at t − j ± N. No second meeting falls on a
    tap as long as N ≥ length + max(taps − 1, taps_back). Of the lengths 2^a·{1, 3, 5, 9, 15} the smallest is taken.

    >>> fft_length(1000, 1000, 999), fft_length(1000, 5, 0), fft_length(1, 1, 0)
    (2048, 1024, 2)
    """
    least = max(length + max(taps - 1, taps_back), 2)
    return min(odd << max(-(-least // odd) - 1, 1).bit_length() for odd in (1, 3, 5, 9, 15))


def compute_dtype(u: Tensor, kernel: Tensor) -> torch.dtype:
    """At least float32, whatever comes in; float64 stays float64."""
    return torch.promote_types(torch.promote_types(u.dtype, kernel.dtype), torch.float32)


def _blocks(u: Tensor, n: int, dtype: torch.dtype) -> list[slice]:
    channels = u.shape[2]
    if u.device.type != "cpu":
        return [slice(0, channels)]
    width = max(BLOCK_BYTES // (max(u.shape[0], 1) * n * dtype.itemsize), 4)
    return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]


def _place_taps(circle: Tensor, forward: Tensor, back: Tensor, skip: Tensor | None) -> Tensor:
    """Fill circle `(c, N)`: lag s at s, lag −s at N − s, the skip on lag 0."""
    n, taps, taps_back = circle.shape[1], forward.shape[1], back.shape[1]
    circle[:, :taps] = forward
    circle[:, taps : n - taps_back] = 0
    if taps_back:
        circle[:, n - taps_back :] = back.flip(1)
    if skip is not None:
        circle[:, 0] += skip
    return circle


def _crop(kernel: Tensor, kernel_back: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Leave out the lags that no pair of positions has."""
    return kernel[:, :length], kernel_back[:, : max(length - 1, 0)]


def _as_rows(buffer: Tensor, x: Tensor) -> Tensor:
    """Copy x `(B, L, c)` into the front of buffer `(B, c, N)`, whose tail holds zeros already."""
    buffer[:, :, : x.shape[1]].copy_(x.transpose(1, 2))
    return buffer


def convolve(u: Tensor, kernel: Tensor, kernel_back: Tensor, skip: Tensor | None) -> Tensor:
    """Return y `(B, L, C)` for u `(B, L, C)`, kernel `(C, K)`, kernel_back `(C, K_back)`, skip `(C,)`."""
    batch, length = u.shape[:2]
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    kernel, kernel_back = _crop(kernel, kernel_back, length)
    n = fft_length(length, kernel.shape[1], kernel_back.shape[1])
    dtype = compute_dtype(u, kernel)
    with torch.autocast(u.device.type, enabled=False):
        blocks = _blocks(u, n, dtype)
        width = blocks[0].stop if blocks else 0
        rows = torch.zeros(batch, width, n, dtype=dtype, device=u.device)
        circle = torch.empty(width, n, dtype=dtype, device=u.device)
        for c in blocks:
            width = c.stop - c.start
            taps = _place_taps(circle[:width], kernel[c], kernel_back[c], None if skip is None else skip[c])
            spectrum = torch.fft.rfft(_as_rows(rows[:, :width], u[:, :, c]))
            spectrum *= torch.fft.rfft(taps)
            y[:, :, c] = torch.fft.irfft(spectrum, n=n)[:, :, :length].transpose(1, 2)
    return y


def convolve_backward(
    grad: Tensor,
    u: Tensor,
    kernel: Tensor,
    kernel_back: Tensor,
    skip: Tensor | None,
    input_grad: bool,
    kernel_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of u, kernel and kernel_back; those not asked for are empty.

    The gradient of u is the convolution of `grad` with the mirrored kernel, that of the kernel the correlation of
    `grad` and u, summed over the batch before its one inverse transform. The skip's gradient is lag 0 of the kernel's.
    """
    batch, length = u.shape[:2]
    d_u, d_kernel, d_back = empty_gradients(u, kernel, kernel_back, input_grad, kernel_grad)
    if kernel_grad:  # lags that no pair of positions has
        d_kernel[:, length:] = 0
        d_back[:, max(length - 1, 0) :] = 0
    kernel, kernel_back = _crop(kernel, kernel_back, length)
    taps, taps_back = kernel.shape[1], kernel_back.shape[1]
    n = fft_length(length, taps, taps_back)
    dtype = compute_dtype(u, kernel)
    with torch.autocast(u.device.type, enabled=False):
        blocks = _blocks(u, n, dtype)
        width = blocks[0].stop if blocks else 0
        rows = torch.zeros(batch, width, n, dtype=dtype, device=u.device)
        circle = torch.empty(width, n, dtype=dtype, device=u.device)
        for c in blocks:
            width = c.stop - c.start
            spectrum = torch.fft.rfft(_as_rows(rows[:, :width], grad[:, :, c]))
            if kernel_grad:
                product = torch.fft.rfft(_as_rows(rows[:, :width], u[:, :, c])).conj_physical_()
                product *= spectrum
                lags = torch.fft.irfft(product.sum(0), n=n)
                d_kernel[c, :taps] = lags[:, :taps]
                if taps_back:
                    d_back[c, :taps_back] = lags[:, n - taps_back :].flip(1)
            if input_grad:
                mirrored = _place_mirrored(circle[:width], kernel[c], kernel_back[c], None if skip is None else skip[c])
                spectrum *= torch.fft.rfft(mirrored)
                d_u[:, :, c] = torch.fft.irfft(spectrum, n=n)[:, :, :length].transpose(1, 2)
    return d_u, d_kernel, d_back


def _place_mirrored(circle: Tensor, forward: Tensor, back: Tensor, skip: Tensor | None) -> Tensor:
    """Fill circle `(c, N)` with the kernel of the transposed convolution: lag s ↔ lag −s."""
    _place_taps(circle[:, 1:], back, forward[:, 1:], None)
    circle[:, 0] = forward[:, 0]
    if skip is not None:
        circle[:, 0] += skip
    return circle


def empty_gradients(
    u: Tensor, kernel: Tensor, kernel_back: Tensor, input_grad: bool, kernel_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the gradients asked for, contiguous, and empty tensors for the others."""
    d_u = torch.empty(u.shape if input_grad else (0,), dtype=u.dtype, device=u.device)
    d_kernel = torch.empty(kernel.shape if kernel_grad else (0,), dtype=kernel.dtype, device=u.device)
    d_back = torch.empty(kernel_back.shape if kernel_grad else (0,), dtype=kernel_back.dtype, device=u.device)
    return d_u, d_kernel, d_back
