"""The long convolution by real FFTs, with a backward of its own.

Everything runs in blocks of channels, so that the padded copies and the spectra of one block stay in the cache and the
memory needed beside inputs and outputs is that of one block. Complex tensors never leave this file.

Shapes: B batch, L length, C channels, K taps, N FFT length, F = N//2 + 1 frequencies.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from chela.ops.memory import Workspace, in_huge_pages

LINE = 16
"""Channels in a block, on a CPU: 64 bytes of float32, so that a block reads and writes whole cache lines."""
BLOCK_BYTES = 3 << 20
"""Where the padded input of one block is smaller than this, more lines are taken at once."""


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


def convolve(u: Tensor, kernel: Tensor, kernel_back: Tensor, skip: Tensor | None) -> Tensor:
    """Return y `(B, L, C)` for u `(B, L, C)`, kernel `(C, K)`, kernel_back `(C, K_back)`, skip `(C,)`."""
    batch, length = u.shape[:2]
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if u.numel() == 0:
        return y
    in_huge_pages(y)
    kernel, kernel_back = _crop(kernel, kernel_back, length)
    n = fft_length(length, kernel.shape[1], kernel_back.shape[1])
    with torch.autocast(u.device.type, enabled=False):
        for rows, buffer, blocks in _spans(u, batch + 1, n, compute_dtype(u, kernel)):
            of_u = rows[:batch, :, :length].transpose(1, 2)
            for c in blocks:
                of_u.copy_(_pulled_together(u[:, :, c]))
                _place_taps(rows[batch], kernel[c], kernel_back[c], None if skip is None else skip[c])
                spectrum = torch.fft.rfft(rows)
                product = spectrum[:batch].mul_(spectrum[batch])
                y[:, :, c] = _spread(torch.fft.irfft(product, n=n)[:, :, :length], buffer).transpose(1, 2)
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

    The gradient of u is the correlation of `grad` with the kernel, that of the kernel the correlation of `grad` and u,
    summed over the batch before its one inverse transform. The skip's gradient is lag 0 of the kernel's. A block makes
    one transform each way: of the rows of grad, u and the kernel, then of both gradients.
    """
    batch, length = u.shape[:2]
    d_u, d_kernel, d_back = empty_gradients(u, kernel, kernel_back, input_grad, kernel_grad)
    if u.numel() == 0:
        return d_u, d_kernel.zero_(), d_back.zero_()
    in_huge_pages(d_u, d_kernel, d_back)
    if kernel_grad:  # lags that no pair of positions has
        d_kernel[:, length:] = 0
        d_back[:, length - 1 :] = 0
    kernel, kernel_back = _crop(kernel, kernel_back, length)
    taps, taps_back = kernel.shape[1], kernel_back.shape[1]
    n = fft_length(length, taps, taps_back)
    count = batch + (batch if kernel_grad else 0) + (1 if input_grad else 0)
    with torch.autocast(u.device.type, enabled=False):
        for rows, buffer, blocks in _spans(u, count, n, compute_dtype(u, kernel)):
            of_grad = rows[:batch, :, :length].transpose(1, 2)
            of_u = rows[batch : 2 * batch, :, :length].transpose(1, 2)
            for c in blocks:
                of_grad.copy_(_pulled_together(grad[:, :, c]))
                if kernel_grad:
                    of_u.copy_(_pulled_together(u[:, :, c]))
                if input_grad:
                    _place_taps(rows[-1], kernel[c], kernel_back[c], None if skip is None else skip[c])
                spectrum = torch.fft.rfft(rows)
                of_both, factors = spectrum[:batch], spectrum[batch:].conj_physical_()
                if kernel_grad:
                    product = factors[:batch].mul_(of_both)
                    if batch > 1:
                        product[0] = product.sum(0)
                if input_grad:
                    of_both *= factors[-1]
                wanted = spectrum[0 if input_grad else batch : batch + (1 if kernel_grad else 0)]
                back = torch.fft.irfft(wanted, n=n)
                if input_grad:
                    d_u[:, :, c] = _spread(back[:batch, :, :length], buffer).transpose(1, 2)
                if kernel_grad:
                    d_kernel[c, :taps] = back[-1, :, :taps]
                if kernel_grad and taps_back:
                    d_back[c, :taps_back] = back[-1, :, n - taps_back :].flip(1)
    return d_u, d_kernel, d_back


def empty_gradients(
    u: Tensor, kernel: Tensor, kernel_back: Tensor, input_grad: bool, kernel_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the gradients asked for, contiguous, and empty tensors for the others."""
    d_u = torch.empty(u.shape if input_grad else (0,), dtype=u.dtype, device=u.device)
    d_kernel = torch.empty(kernel.shape if kernel_grad else (0,), dtype=kernel.dtype, device=u.device)
    d_back = torch.empty(kernel_back.shape if kernel_grad else (0,), dtype=kernel_back.dtype, device=u.device)
    return d_u, d_kernel, d_back


def _spans(u: Tensor, count: int, n: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Workspace, list[slice]]]:
    """Cut the channels into blocks, with a buffer of `count` rows a channel, `(count, c, N)`, for those of one width.

    The buffer is zero at first: whoever fills the same places for every block finds zeros elsewhere. It comes
    with the workspace that it is cut from.
    """
    channels = width = u.shape[2]
    if u.device.type == "cpu":
        most = max(BLOCK_BYTES // (LINE * count * n * dtype.itemsize), 1)
        lines = -(-channels // LINE)
        width = min(LINE * -(-lines // -(-lines // most)), channels)  # as many blocks, but of like widths
    whole = channels - channels % width
    spans = [(width, range(0, whole, width)), (channels - whole, range(whole, channels, width))]
    with Workspace(dtype, u.device, buffers_per_block=1) as buffer:
        for width, starts in spans:
            if starts:
                rows = buffer("rows", count, width, n).zero_()
                yield rows, buffer, [slice(start, start + width) for start in starts]


def _spread(x: Tensor, buffer: Workspace) -> Tensor:
    """Move a block of results `(B, c, L)`, on a CPU, to rows that are no power of two apart, before it is transposed.

    Else the same place of every channel falls into one set of the cache, which does not hold them all.
    """
    if x.device.type != "cpu":
        return x
    batch, channels, length = x.shape
    return buffer("results", batch, channels, length + LINE)[..., :length].copy_(x)


def _pulled_together(x: Tensor) -> Tensor:
    """Make a block of channels `(B, L, c)` contiguous on a CPU, before it is transposed.

    Else every element of a row comes from another cache line, which is gone when the next row wants it.
    """
    return x.contiguous() if x.device.type == "cpu" else x


def _crop(kernel: Tensor, kernel_back: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Leave out the lags that no pair of positions has."""
    return kernel[:, :length], kernel_back[:, : length - 1]


def _place_taps(circle: Tensor, forward: Tensor, back: Tensor, skip: Tensor | None) -> None:
    """Put the kernel on a circle `(c, N)` of zeros: lag s at s, lag −s at N − s, the skip on lag 0."""
    circle[:, : forward.shape[1]] = forward
    if back.shape[1]:
        circle[:, circle.shape[1] - back.shape[1] :] = back.flip(1)
    if skip is not None:
        circle[:, 0] += skip
