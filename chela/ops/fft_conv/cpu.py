"""The long convolution made fast on a CPU; it runs on any device. Called ``backend="fft"``.

It has a backward of its own and runs in blocks of channels. So the padded copies and the spectra of one block stay in
the cache, and the memory needed beside inputs and outputs is that of one block. Complex tensors never leave this file.

Shapes: B batch, L length, C channels, K taps, N FFT length, F = N//2 + 1 frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from chela.ops.fft_conv.plain import crop, fft_length, on_circle
from chela.ops.flops import Shape, count_flops
from chela.ops.memory import Workspace, in_huge_pages
from chela.ops.precision import accumulation_dtype

LINE = 16
"""Channels in a block, on a CPU: 64 bytes of float32, so that a block reads and writes whole cache lines."""
BLOCK_BYTES = 3 << 20
"""Where the padded input of one block is smaller than this, more lines are taken at once."""


@torch.library.custom_op("chela::fft_conv", mutates_args=())
def convolve(u: Tensor, kernel: Tensor, kernel_back: Tensor, skip: Tensor | None) -> Tensor:
    """Return y ``(B, L, C)`` for u ``(B, L, C)``, kernel ``(C, K)``, kernel_back ``(C, K_back)``, skip ``(C,)``."""
    batch, length = u.shape[:2]
    y = u.new_empty(u.shape)
    if u.numel() == 0:
        return y
    in_huge_pages(y)
    kernel, kernel_back = crop(kernel, kernel_back, length)
    n = fft_length(length, kernel.shape[1], kernel_back.shape[1])
    with torch.autocast(u.device.type, enabled=False):
        for rows, buffer, blocks in _spans(u, batch + 1, n, accumulation_dtype(u.dtype, kernel.dtype)):
            of_u = rows[:batch, :, :length].transpose(1, 2)
            for c in blocks:
                of_u.copy_(_pulled_together(u[:, :, c]))
                on_circle(rows[batch], kernel[c], kernel_back[c], None if skip is None else skip[c])
                spectrum = torch.fft.rfft(rows)
                product = spectrum[:batch].mul_(spectrum[batch])
                y[:, :, c] = _spread(torch.fft.irfft(product, n=n)[:, :, :length], buffer).transpose(1, 2)
    return y


@torch.library.custom_op("chela::fft_conv_backward", mutates_args=())
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

    The gradient of u is the correlation of grad with the kernel. That of the kernel is the correlation of grad and u,
    summed over the batch before its one inverse transform; the skip's is lag 0 of it. A block makes one transform each
    way: of the rows of grad, u and the kernel, then of both gradients.
    """
    batch, length = u.shape[:2]
    d_u, d_kernel, d_back = _empty_gradients(u, kernel, kernel_back, input_grad, kernel_grad)
    if u.numel() == 0:
        return d_u, d_kernel.zero_(), d_back.zero_()
    in_huge_pages(d_u, d_kernel, d_back)
    if kernel_grad:  # lags that no pair of positions has
        d_kernel[:, length:] = 0
        d_back[:, length - 1 :] = 0
    kernel, kernel_back = crop(kernel, kernel_back, length)
    taps, taps_back = kernel.shape[1], kernel_back.shape[1]
    n = fft_length(length, taps, taps_back)
    count = batch + (batch if kernel_grad else 0) + (1 if input_grad else 0)
    with torch.autocast(u.device.type, enabled=False):
        for rows, buffer, blocks in _spans(u, count, n, accumulation_dtype(u.dtype, kernel.dtype)):
            of_grad = rows[:batch, :, :length].transpose(1, 2)
            of_u = rows[batch : 2 * batch, :, :length].transpose(1, 2)
            for c in blocks:
                of_grad.copy_(_pulled_together(grad[:, :, c]))
                if kernel_grad:
                    of_u.copy_(_pulled_together(u[:, :, c]))
                if input_grad:
                    on_circle(rows[-1], kernel[c], kernel_back[c], None if skip is None else skip[c])
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


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    u, kernel, kernel_back, skip = ctx.saved_tensors
    for_u, for_kernel, for_back, for_skip = ctx.needs_input_grad
    of_kernel = for_kernel or for_back or for_skip
    d_u, d_kernel, d_back = convolve_backward(grad, u, kernel, kernel_back, skip, for_u, of_kernel)
    d_skip = d_kernel[:, 0].to(skip.dtype) if for_skip else None
    return d_u if for_u else None, d_kernel if for_kernel else None, d_back if for_back else None, d_skip


convolve.register_fake(lambda u, *_: u.new_empty(u.shape))
convolve_backward.register_fake(lambda grad, u, kernel, back, _, *asked: _empty_gradients(u, kernel, back, *asked))
convolve.register_autograd(_differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def _empty_gradients(
    u: Tensor, kernel: Tensor, kernel_back: Tensor, input_grad: bool, kernel_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the gradients asked for, contiguous, and empty tensors for the others."""
    d_u = u.new_empty(u.shape if input_grad else 0)
    d_kernel, d_back = (x.new_empty(x.shape if kernel_grad else 0) for x in (kernel, kernel_back))
    return d_u, d_kernel, d_back


def _spans(u: Tensor, count: int, n: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Workspace, list[slice]]]:
    """Cut the channels into blocks, and give those of one width a buffer ``(count, c, N)``, and its workspace.

    The buffer is zero at first. As each block fills the same places, all others stay zero.
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
    """Move a block of results ``(B, c, L)``, on a CPU, to rows that are no power of two apart, before it is transposed.

    Otherwise the same place of every channel falls into one set of the cache, which cannot hold them all.
    """
    if x.device.type != "cpu":
        return x
    batch, channels, length = x.shape
    return buffer("results", batch, channels, length + LINE)[..., :length].copy_(x)


def _pulled_together(x: Tensor) -> Tensor:
    """Make a block of channels ``(B, L, c)`` contiguous on a CPU, before it is transposed.

    Otherwise every element of a row comes from another cache line, which is gone when the next row needs it.
    """
    return x.contiguous() if x.device.type == "cpu" else x


def forward_flops(u: Shape, kernel: Shape, kernel_back: Shape, *_: Any, **__: Any) -> int:
    """Return the FLOPs of ``chela::fft_conv``: every channel of every sequence there and back, every kernel once.

    >>> forward_flops((1, 4, 1), (1, 4), (1, 0))
    204
    """
    batch = u[0]
    return _flops(u, kernel, kernel_back, 2 * batch + 1 + (kernel_back[1] > 0), batch)


def backward_flops(_: Shape, u: Shape, kernel: Shape, kernel_back: Shape, *__: Any, **___: Any) -> int:
    """Return the FLOPs of ``chela::fft_conv_backward``: there for the gradient, u and the kernel, back for two."""
    batch = u[0]
    return _flops(u, kernel, kernel_back, 3 * batch + 2, 2 * batch)


def _flops(u: Shape, kernel: Shape, kernel_back: Shape, transforms: int, products: int) -> int:
    """Return the FLOPs of real transforms, 2.5·n·log2 n each, and products of spectra."""
    _, length, channels = u
    n = length + max(kernel[1], kernel_back[1])
    return int(channels * (transforms * 2.5 * n * math.log2(n) + 3 * n * products))


count_flops(torch.ops.chela.fft_conv, forward_flops)
count_flops(torch.ops.chela.fft_conv_backward, backward_flops)
