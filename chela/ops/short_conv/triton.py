"""The short convolution in Triton: launches, and the registration with PyTorch."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from chela.ops.backend import accumulation_dtype

BLOCK_L, BLOCK_C, WARPS = 64, 32, 4
"""One launch for all: at K = 31 and any dtype it stays within registers on sm_80, sm_90 and sm_100."""


def _launch(name: str, tensors: list[Tensor], like: Tensor, taps: int, left: int, **flags: bool) -> None:
    """Start kernel ``name`` on tiles of a ``(B, L, C)`` tensor."""
    kernels = importlib.import_module("chela.ops.short_conv.kernels")
    batch, length, channels = like.shape
    dtype = accumulation_dtype(*(t.dtype for t in tensors))
    getattr(kernels, name)[(batch * -(-length // BLOCK_L), -(-channels // BLOCK_C))](
        *tensors, length, channels, K=taps, LEFT=left, **flags, BLOCK_L=BLOCK_L, BLOCK_C=BLOCK_C,
        dtype=kernels.tl.float64 if dtype == torch.float64 else kernels.tl.float32, num_warps=WARPS,
    )  # fmt: skip


@torch.library.custom_op("chela::short_conv_triton", mutates_args=())
def short_conv_triton(x: Tensor, weight: Tensor, left: int, silu: bool) -> Tensor:
    """Return ``(B, L, C)`` in the dtype of x; the arguments are those of ``short_conv_reference``."""
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    _launch("short_conv_kernel", [x, weight, y], x, weight.shape[1], left, FLIP=False, SILU=silu)
    return y


@torch.library.custom_op("chela::short_conv_triton_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, left: int, silu: bool) -> tuple[Tensor, Tensor]:
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    batch, length, channels = x.shape
    taps, dtype = weight.shape[1], accumulation_dtype(x.dtype, weight.dtype)
    d_x, d_sum = torch.empty_like(x), torch.empty_like(x, dtype=dtype) if silu else grad
    partial = x.new_empty(batch * -(-length // BLOCK_L), taps, channels, dtype=dtype)
    _launch("short_conv_backward_kernel", [grad, x, weight, d_sum, partial], x, taps, left, SILU=silu)
    _launch("short_conv_kernel", [d_sum, weight, d_x], x, taps, taps - 1 - left, FLIP=True, SILU=False)
    return d_x, partial.sum(0).T.to(weight.dtype).contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.left, ctx.silu = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward(grad, *ctx.saved_tensors, ctx.left, ctx.silu)
    wanted = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None)


short_conv_triton.register_fake(lambda x, *_: x.new_empty(x.shape))
_backward.register_fake(lambda grad, x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape)))
short_conv_triton.register_autograd(_differentiate, setup_context=_save)
