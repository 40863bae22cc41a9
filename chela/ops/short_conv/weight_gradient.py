"""The weight gradient of a short depthwise convolution: for every tap the sum of `grad` times the x that it met.

Shapes: B batch, L length, C channels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SLICE_ELEMENTS = 2**18
"""Elements of x that are worked on at once, so that they stay in the cache: 1 MiB of float32."""
BLOCK = 128
"""Most tokens of a block."""
LEAST_TAPS = 8
"""Fewer taps than these are done sooner one by one."""


def weight_gradient(grad: Tensor, x: Tensor, taps: int, left: int) -> Tensor:
    """Return `(C, K)`: `Σ_{b,t} grad[b, t, c]·x[b, t + k − left, c]`, x being 0 outside.

    O(B·L·C·K).

    Args:
        grad: `(B, L, C)`.
        x: `(B, L, C)`, dtype and device of grad.
        taps: K.
        left: Taps before the position they contribute to.
    """
    one_dnn = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    way = in_blocks if one_dnn and taps >= LEAST_TAPS and x.numel() else tap_by_tap
    return way(grad, x, taps, left).mT.contiguous()


def in_blocks(grad: Tensor, x: Tensor, taps: int, left: int) -> Tensor:
    """Convolve every block of x, K − 1 tokens wider, by its block of `grad`; the sum over blocks, `(K, C)`.

    A block's `grad` is the kernel and the block a group of channels, so one depthwise convolution with as many groups
    as there are blocks and channels does all taps in one pass, where tap by tap there are 2·K passes.
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
    """Tap by tap, all taps of a slice before the next one; `(K, C)`."""
    batch, length, channels = x.shape
    padded = F.pad(x, (0, 0, left, taps - 1 - left))
    rows = max(1, SLICE_ELEMENTS // max(1, length * channels))
    tokens = max(1, SLICE_ELEMENTS // max(1, channels))
    slices = [(b, t) for b in range(0, batch, rows) for t in range(0, length, tokens)]
    sums = grad.new_empty(len(slices), taps, channels)
    for (b, start), of_slice in zip(slices, sums, strict=True):
        part = grad[b : b + rows, start : start + tokens]
        met, product = padded[b : b + rows, start:], torch.empty_like(part)
        for tap, of_tap in enumerate(of_slice):
            torch.mul(met[:, tap : tap + part.shape[1]], part, out=product)
            torch.sum(product, (0, 1), out=of_tap)
    return sums.sum(0)
