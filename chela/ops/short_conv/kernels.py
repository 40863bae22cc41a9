"""Triton kernels of the short convolution. Imported only when they run, so that the package needs no triton.

Shapes: x, y ``(B, L, C)`` contiguous, weight ``(C, K)``. A program holds BLOCK_L positions of BLOCK_C channels of one
sequence. Offsets into the tensors are 64-bit: B·L·C may pass 2³¹.
"""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _tile(L, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return this program's sequence, positions and channels; the first grid axis runs over sequences and tiles."""
    tiles = (L + BLOCK_L - 1) // BLOCK_L
    rows = (tl.program_id(0) % tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
    return tl.program_id(0) // tiles, rows, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _place(batch, rows, channels, L, C):
    """Return the offsets of x[batch, rows, channels], and which of them are inside."""
    offsets = (batch.to(tl.int64) * L + rows.to(tl.int64))[:, None] * C + channels[None, :]
    return offsets, (rows >= 0)[:, None] & (rows < L)[:, None] & (channels < C)[None, :]


@triton.jit
def _load_rows(x_ptr, batch, rows, channels, L, C, dtype: tl.constexpr):
    """Load x[batch, rows, channels] as ``dtype``; 0 outside."""
    offsets, inside = _place(batch, rows, channels, L, C)
    return tl.load(x_ptr + offsets, mask=inside, other=0.0).to(dtype)


@triton.jit
def _convolved(
    x_ptr, weight_ptr, batch, rows, channels, L, C,
    K: tl.constexpr, LEFT: tl.constexpr, FLIP: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Return Σ_j weight[j]·x[rows + j − LEFT] as ``(BLOCK_L, BLOCK_C)``; FLIP reads the taps from the end."""
    total = tl.full((BLOCK_L, BLOCK_C), 0.0, dtype)
    for j in range(K):
        tap = K - 1 - j if FLIP else j
        weight = tl.load(weight_ptr + channels * K + tap, mask=channels < C, other=0.0).to(dtype)
        total += weight[None, :] * _load_rows(x_ptr, batch, rows + (j - LEFT), channels, L, C, dtype)
    return total


@triton.jit
def short_conv_kernel(
    x_ptr, weight_ptr, y_ptr, L, C,
    K: tl.constexpr, LEFT: tl.constexpr, FLIP: tl.constexpr, SILU: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Write one tile of y; FLIP with LEFT = K − 1 − left gives the gradient of x from that of the sum."""
    batch, rows, channels = _tile(L, BLOCK_L, BLOCK_C)
    y = _convolved(x_ptr, weight_ptr, batch, rows, channels, L, C, K, LEFT, FLIP, BLOCK_L, BLOCK_C, dtype)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    offsets, inside = _place(batch, rows, channels, L, C)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def short_conv_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, d_sum_ptr, partial_ptr, L, C,
    K: tl.constexpr, LEFT: tl.constexpr, SILU: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Write one tile of the sum's gradient, and this tile's part of the weight's gradient.

    The parts go to partial ``(B·⌈L/BLOCK_L⌉, K, C)``. They are added up afterwards in a fixed order: no atomics, so
    the same bits every time. The sum before SiLU is computed again rather than kept.
    """
    batch, rows, channels = _tile(L, BLOCK_L, BLOCK_C)
    d_sum = _load_rows(grad_ptr, batch, rows, channels, L, C, dtype)
    if SILU:
        total = _convolved(x_ptr, weight_ptr, batch, rows, channels, L, C, K, LEFT, False, BLOCK_L, BLOCK_C, dtype)
        sigmoid = 1.0 / (1.0 + tl.exp(-total))
        d_sum *= sigmoid * (1.0 + total * (1.0 - sigmoid))
        offsets, inside = _place(batch, rows, channels, L, C)
        tl.store(d_sum_ptr + offsets, d_sum, mask=inside)
    part_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * K * C + channels
    for j in range(K):
        x = _load_rows(x_ptr, batch, rows + (j - LEFT), channels, L, C, dtype)
        tl.store(part_ptr + j * C, tl.sum(d_sum * x, axis=0), mask=channels < C)
