"""The long convolution made fast on a CPU; it runs on any device. Called ``backend="fft"``.

It has its own backward pass and takes a block of channels at a time: the padded copies and spectra of one block stay in
the cache, and are all the memory needed beside inputs and outputs. Complex tensors never leave this file.

Shapes: B batch, L length, C channels, N FFT length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from chela.ops.backend import accumulation_dtype
from chela.ops.fft_conv.plain import fft_length, in_order
from chela.ops.memory import in_huge_pages

LINE = 16
"""Channels in a block, on a CPU: 64 bytes of float32, so that a block reads and writes whole cache lines."""
BLOCK_BYTES, OF_FEW_TOKENS = 2 << 20, 7 << 20
"""Where the padded input of one block is smaller than this, a block has more channels: below 256 tokens the calls of
more blocks cost more than the cache saves."""
SHORT = 1024
"""Tokens of a block of a sequence that stay in the cache until they are transposed."""


def fft_conv_fast(u: Tensor, kernel: Tensor, kernel_back: Tensor, skip: Tensor | None) -> Tensor:
    """Return ``(B, L, C)`` in the dtype of u; the arguments are those of ``fft_conv_reference``."""
    return convolve(u, in_order(kernel, kernel_back, skip, u.shape[1]))  # type: ignore[no-any-return]


@torch.library.custom_op("chela::fft_conv", mutates_args=())
def convolve(u: Tensor, lags: Tensor) -> Tensor:
    """Return y ``(B, L, C)`` for u ``(B, L, C)`` and lags ``(C, 2·L − 1)``, or ``(C, L)``; see ``in_order``.

    The first lag is at place 0 of the circle, so the outputs are as many places later as there are lags before 0.
    """
    batch, length = u.shape[:2]
    y = u.new_empty(u.shape)
    if u.numel() == 0:
        return y
    in_huge_pages(y)
    with torch.autocast(u.device.type, enabled=False):
        for rows, blocks in _spans(u, batch + 1, accumulation_dtype(u.dtype, lags.dtype)):
            for c in blocks:
                _load(rows[:batch], u[:, :, c])
                rows[batch, :, : lags.shape[1]] = lags[c]
                spectrum = torch.fft.rfft(rows)
                product = spectrum[:batch].mul_(spectrum[batch])
                found = torch.fft.irfft(product, n=rows.shape[2])[:, :, lags.shape[1] - length : lags.shape[1]]
                y[:, :, c] = _spread(found).transpose(1, 2)
    return y


@torch.library.custom_op("chela::fft_conv_backward", mutates_args=())
def convolve_backward(
    grad: Tensor, u: Tensor, lags: Tensor, input_grad: bool, lags_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of u and lags; one not asked for is empty.

    The gradient of u is the correlation of grad with the lags. That of the lags is the correlation of grad and u,
    summed over the batch before its one inverse transform. A block makes one transform each way: of the rows of grad,
    the lags and u, then of both gradients.
    """
    batch, length = u.shape[:2]
    d_u, d_lags = u.new_empty(u.shape if input_grad else 0), lags.new_empty(lags.shape if lags_grad else 0)
    if u.numel() == 0:
        return d_u, d_lags.zero_()
    in_huge_pages(d_u, d_lags)
    count = batch + 1 + (batch if lags_grad else 0)
    with torch.autocast(u.device.type, enabled=False):
        for rows, blocks in _spans(u, count, accumulation_dtype(u.dtype, lags.dtype)):
            for c in blocks:
                _load(rows[:batch, :, lags.shape[1] - length :], grad[:, :, c])
                rows[batch, :, : lags.shape[1]] = lags[c]
                if lags_grad:
                    _load(rows[batch + 1 :], u[:, :, c])
                spectrum = torch.fft.rfft(rows)
                of_grad, of_lags, of_u = spectrum[:batch], spectrum[batch], spectrum[batch + 1 :]
                spectrum[batch:].conj_physical_()
                if lags_grad:
                    of_u.mul_(of_grad)
                if input_grad:
                    of_grad.mul_(of_lags)
                if lags_grad:
                    torch.sum(of_u, 0, out=of_lags)
                wanted = spectrum[0 if input_grad else batch : batch + lags_grad]
                back = torch.fft.irfft(wanted, n=rows.shape[2])
                if input_grad:
                    d_u[:, :, c] = _spread(back[:batch, :, :length]).transpose(1, 2)
                if lags_grad:
                    d_lags[c] = back[-1, :, : lags.shape[1]]
    return d_u, d_lags


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = convolve_backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad)
    return tuple(x if wanted else None for x, wanted in zip(found, ctx.needs_input_grad, strict=True))


@convolve_backward.register_fake
def _(grad: Tensor, u: Tensor, lags: Tensor, input_grad: bool, lags_grad: bool) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape if input_grad else 0), lags.new_empty(lags.shape if lags_grad else 0)


convolve.register_fake(lambda u, lags: u.new_empty(u.shape))
convolve.register_autograd(_differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def _spans(u: Tensor, count: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, list[slice]]]:
    """Cut the channels into blocks; blocks of one width share a buffer ``(count, c, N)``.

    The buffer starts as zeros. Each block fills the same places, so the padding stays zero.
    """
    n = fft_length(u.shape[1])
    channels = width = u.shape[2]
    if u.device.type == "cpu":
        size = BLOCK_BYTES if u.shape[1] >= 256 else OF_FEW_TOKENS
        most = max(size // (LINE * count * n * dtype.itemsize), 1)
        lines = -(-channels // LINE)
        width = min(LINE * -(-lines // -(-lines // most)), channels)  # as many blocks, of nearly equal widths
    whole = channels - channels % width
    spans = [(width, range(0, whole, width)), (channels - whole, range(whole, channels, width))]
    for width, starts in spans:
        if starts:
            rows = torch.zeros(count, width, n, dtype=dtype, device=u.device)
            yield rows, [slice(start, start + width) for start in starts]


def _load(rows: Tensor, x: Tensor) -> None:
    """Write a block of channels ``(B, L, c)`` to the first places of rows ``(B, c, N)``.

    On a CPU it is made contiguous first, unless a sequence of it stays in the cache: otherwise every element of a row
    comes from another cache line, which is gone when the next row needs it.
    """
    whole = x.device.type == "cpu" and x.shape[1] > SHORT
    rows[:, :, : x.shape[1]] = (x.contiguous() if whole else x).transpose(1, 2)


def _spread(x: Tensor) -> Tensor:
    """Move a block of results ``(B, c, L)``, on a CPU, to rows that are no power of two apart, before it is transposed.

    Otherwise the same place of every channel falls into one set of the cache, which cannot hold them all.
    """
    if x.device.type != "cpu" or x.shape[2] <= SHORT:
        return x
    batch, channels, length = x.shape
    return x.new_empty(batch, channels, length + LINE)[..., :length].copy_(x)
