"""The short convolution on any device, by PyTorch's depthwise convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from chela.ops.short_conv.weight_gradient import weight_gradient


def short_conv_torch(x: Tensor, weight: Tensor, bias: Tensor | None, causal: bool, silu: bool) -> Tensor:
    """Return `(B, L, C)` for x `(B, L, C)`, weight `(C, K)`, bias `(C,)`, in the dtype of x."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    left = weight.shape[1] - 1 if causal else (weight.shape[1] - 1) // 2
    with torch.autocast(x.device.type, enabled=False):
        convolve = _sum_of_taps if torch.compiler.is_compiling() else _Depthwise.apply
        y = convolve(x.to(dtype), weight.to(dtype), left)
        y = y if bias is None else y + bias.to(dtype)
        return (F.silu(y) if silu else y.contiguous()).to(x.dtype)


class _Depthwise(torch.autograd.Function):
    """The convolution with a backward of its own: PyTorch's takes up to 80 times as long as its forward on a CPU."""

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
    """Convolve by `conv2d`, with `left` of the taps before the position they contribute to.

    A `(B, L, C)` tensor *is* a channels-last image `(B, C, 1, L)`, so the 2-d convolution reads and writes it where it
    lies; a 1-d convolution would transpose it twice.
    """
    if not x.numel():  # `conv2d` takes no empty image
        return torch.empty_like(x)
    length, taps = x.shape[1], weight.shape[1]
    pad = max(left, taps - 1 - left)
    y = F.conv2d(x.transpose(1, 2).unsqueeze(2), weight[:, None, None], padding=(0, pad), groups=x.shape[2])
    # `conv2d` pads both ends alike: with unequal ones the shorter end has outputs to spare.
    return y.squeeze(2).transpose(1, 2)[:, pad - left : pad - left + length]


def _sum_of_taps(x: Tensor, weight: Tensor, left: int) -> Tensor:
    """The same by shifted products: the compiler makes one loop of them, but no layout of an unknown length."""
    length, taps = x.shape[1], weight.shape[1]
    padded = _padded(x, taps, left)
    y = padded[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        y = y + padded[:, tap : tap + length] * weight[:, tap]
    return y


def _padded(x: Tensor, taps: int, left: int) -> Tensor:
    """Add zeros for the taps that reach beyond the ends."""
    return F.pad(x, (0, 0, left, taps - 1 - left))
