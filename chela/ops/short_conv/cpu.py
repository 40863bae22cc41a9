"""The short convolution made fast on a CPU; it runs on any device. Called ``backend="torch"``.

Forward and the gradient of x are PyTorch's depthwise convolution. The gradient of the weights is our own: for every tap
the sum of the output's gradient times the x that it met. PyTorch's takes up to 80 times as long as its forward.

Shapes: B batch, L length, C channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from chela.ops.precision import accumulation_dtype
from chela.ops.short_conv.reference import sum_of_taps

SLICE_ELEMENTS = 2**18
"""Elements of x that are worked on at once, so that they stay in the cache: 1 MiB of float32."""
BLOCK = 128
"""Most tokens of a block."""
LEAST_TAPS = 8
"""Fewer taps than these are done sooner one by one."""


def short_conv_torch(x: Tensor, weight: Tensor, left: int, silu: bool) -> Tensor:
    """Return ``(B, L, C)`` in the dtype of x; the arguments are those of ``short_conv_reference``."""
    dtype = accumulation_dtype(x.dtype, weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        # Of shifted products the compiler makes one loop; it cannot lay out an image of unknown length.
        convolve = sum_of_taps if torch.compiler.is_compiling() else _Depthwise.apply
        y = convolve(x.to(dtype), weight.to(dtype), left)
        return (F.silu(y) if silu else y.contiguous()).to(x.dtype)


class _Depthwise(torch.autograd.Function):
    """The convolution with a weight gradient of its own."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, left: int) -> Tensor:
        return _as_image(x, weight, left)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.left = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, _ = ctx.needs_input_grad
        taps = weight.shape[1]
        d_x = _as_image(grad, weight.flip(1), taps - 1 - ctx.left) if for_x else None
        return d_x, weight_gradient(grad, x, taps, ctx.left) if for_weight else None, None


def _as_image(x: Tensor, weight: Tensor, left: int) -> Tensor:
    """Convolve by ``conv2d``, with ``left`` of the taps before the position they contribute to.

    A ``(B, L, C)`` tensor is a channels-last image ``(B, C, 1, L)``, so a 2-d convolution works on it where it lies;
    a 1-d convolution would transpose it twice.
    """
    length, taps = x.shape[1], weight.shape[1]
    pad = max(left, taps - 1 - left)
    y = F.conv2d(x.transpose(1, 2).unsqueeze(2), weight[:, None, None], padding=(0, pad), groups=x.shape[2])
    # ``conv2d`` pads both ends alike: with unequal ones the shorter end has outputs to spare.
    return y.squeeze(2).transpose(1, 2)[:, pad - left : pad - left + length]


def weight_gradient(grad: Tensor, x: Tensor, taps: int, left: int) -> Tensor:
    """Return ``(C, K)``: Σ_{b,t} grad[b, t, c]·x[b, t + k − left, c], x being 0 outside. O(B·L·C·K)."""
    one_dnn = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    way = in_blocks if one_dnn and taps >= LEAST_TAPS else tap_by_tap
    return way(grad, x, taps, left).mT.contiguous()


def in_blocks(grad: Tensor, x: Tensor, taps: int, left: int) -> Tensor:
    """Return ``(K, C)`` by convolving each block of x, K − 1 tokens wider, with its block of ``grad`` as the kernel.

    One depthwise convolution with a group for every block and channel does all taps in one pass, where tap by tap there
    are 2·K passes.
    """
    batch, length, channels = x.shape
    blocks = -(-length // BLOCK)
    tokens = -(-length // blocks)
    spare = blocks * tokens - length
    windows = F.pad(x, (0, 0, left, taps - 1 - left + spare)).unfold(1, tokens + taps - 1, tokens)  # (B, N, C, T+K-1)
    kernels = F.pad(grad, (0, 0, 0, spare)) if spare else grad
    kernels = kernels.reshape(batch, blocks, tokens, channels)
    of_row = blocks * tokens * channels
    rows = max(1, SLICE_ELEMENTS // of_row)
    columns = max(1, SLICE_ELEMENTS // (tokens * channels))
    total = grad.new_zeros(taps, channels)
    for row in range(0, batch, rows):
        for column in range(0, blocks, columns):
            part = (slice(row, row + rows), slice(column, column + columns))
            image = windows[part].permute(3, 0, 1, 2).flatten(1)  # (T+K-1, groups): channels last
            kernel = kernels[part].transpose(2, 3).reshape(-1, 1, 1, tokens)
            y = F.conv2d(image.T[None, :, None], kernel, groups=len(kernel))
            total += y[0, :, 0].T.reshape(taps, -1, channels).sum(1)
    return total


def tap_by_tap(grad: Tensor, x: Tensor, taps: int, left: int) -> Tensor:
    """Return ``(K, C)`` tap by tap, all taps of a slice before the next one."""
    batch, length, channels = x.shape
    padded = F.pad(x, (0, 0, left, taps - 1 - left))
    most = SLICE_ELEMENTS if type(x) is Tensor else x.numel()  # a fake tensor lies in no cache
    rows = max(1, most // max(1, length * channels))
    tokens = max(1, most // max(1, channels))
    slices = [(b, t) for b in range(0, batch, rows) for t in range(0, length, tokens)]
    sums = grad.new_empty(len(slices), taps, channels)
    for (b, start), of_slice in zip(slices, sums, strict=True):
        part = grad[b : b + rows, start : start + tokens]
        met, product = padded[b : b + rows, start:], torch.empty_like(part)
        for tap, of_tap in enumerate(of_slice):
            torch.mul(met[:, tap : tap + part.shape[1]], part, out=product)
            torch.sum(product, (0, 1), out=of_tap)
    return sums.sum(0)
