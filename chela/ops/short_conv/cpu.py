"""The short convolution made fast on a CPU; it runs on any device. Called ``backend="torch"``.

Forward and the gradient of x are PyTorch's depthwise convolution. The gradient of the weights is our own, since
PyTorch's takes up to 80 times as long as its forward.

Shapes: B batch, L length, C channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from chela.ops.backend import accumulation_dtype
from chela.ops.short_conv.reference import short_conv_reference

PRODUCTS = 2**20
"""Products of taps that are held at once: 4 MiB of float32."""


def short_conv_torch(x: Tensor, weight: Tensor, left: int, silu: bool) -> Tensor:
    """Return ``(B, L, C)`` in the dtype of x; the arguments are those of ``short_conv_reference``."""
    if torch.compiler.is_compiling():
        # Of shifted products the compiler makes one loop; it cannot lay out an image of unknown length.
        return short_conv_reference(x, weight, left, silu)
    dtype = accumulation_dtype(x.dtype, weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _Depthwise.apply(x.to(dtype), weight.to(dtype), left, silu)  # type: ignore[no-untyped-call]
        return y.to(x.dtype)


class _Depthwise(torch.autograd.Function):
    """The convolution with a weight gradient of its own; it holds x, and makes what SiLU is taken of once more."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, left: int, silu: bool) -> Tensor:
        y = _as_image(x, weight, left)
        return F.silu(y) if silu else y.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.left, ctx.silu = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, *_ = ctx.needs_input_grad
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, _as_image(x, weight, ctx.left))
        taps = weight.shape[1]
        d_x = _as_image(grad, weight.flip(1), taps - 1 - ctx.left) if for_x else None
        return d_x, weight_gradient(grad, x, taps, ctx.left) if for_weight else None, None, None


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
    """Return ``(C, K)``: Σ_{b,t} grad[b, t, c]·x[b, t + k − left, c], x being 0 outside. O(B·L·C·K).

    In one pass: all products of a slice of positions, then their sum.
    """
    batch, length, channels = x.shape
    windows = F.pad(x, (0, 0, left, taps - 1 - left)).unfold(1, taps, 1).transpose(2, 3)  # (B, L, K, C), a view
    rows, tokens = (max(1, PRODUCTS // (taps * channels * n)) for n in (length, 1))
    slices = [
        (slice(b, b + rows), slice(t, t + tokens)) for b in range(0, batch, rows) for t in range(0, length, tokens)
    ]
    products = grad.new_empty(min(rows, batch), min(tokens, length), taps, channels)
    sums = grad.new_empty(len(slices), taps, channels)
    for part, to in zip(slices, sums, strict=True):
        met = windows[part]
        product = torch.mul(met, grad[part].unsqueeze(2), out=products[: met.shape[0], : met.shape[1]])
        torch.sum(product, (0, 1), out=to)
    return sums.sum(0).T.contiguous()
