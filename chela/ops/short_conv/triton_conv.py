"""The short convolution in Triton: launches, and the registration with PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

BLOCK_L, BLOCK_C, WARPS = 64, 32, 4
"""One launch for all: at K = 31 and any dtype it stays within registers on sm_80, sm_90 and sm_100."""


def why_not(device: torch.device) -> str | None:
    """Say why the Triton kernels cannot run on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'chela[triton]', Linux only)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA device, got {device.type} (TRITON_INTERPRET=1 interprets it anywhere, slowly)"
    return None


def short_conv_triton(x: Tensor, weight: Tensor, bias: Tensor | None, causal: bool, silu: bool) -> Tensor:
    """Return `(B, L, C)` for x `(B, L, C)`, weight `(C, K)`, bias `(C,)`, in the dtype of x."""
    left = weight.shape[1] - 1 if causal else (weight.shape[1] - 1) // 2
    y: Tensor = _forward_op(x, weight, bias, left, silu)
    return y


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


def _launch(
    name: str, tensors: list[Tensor], like: Tensor, taps: int, left: int, dtype: torch.dtype, **flags: bool
) -> None:
    """Start kernel `name` on tiles of a `(B, L, C)` tensor."""
    kernels = importlib.import_module("chela.ops.short_conv.kernels")
    batch, length, channels = like.shape
    if like.numel() == 0:
        return
    getattr(kernels, name)[(batch * -(-length // BLOCK_L), -(-channels // BLOCK_C))](
        *tensors,
        length,
        channels,
        K=taps,
        LEFT=left,
        **flags,
        BLOCK_L=BLOCK_L,
        BLOCK_C=BLOCK_C,
        dtype=kernels.tl.float64 if dtype == torch.float64 else kernels.tl.float32,
        num_warps=WARPS,
    )


@torch.library.custom_op("chela::short_conv_triton", mutates_args=())
def _forward_op(x: Tensor, weight: Tensor, bias: Tensor | None, left: int, silu: bool) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    tensors = [x, weight, weight if bias is None else bias.contiguous(), y]
    flags = {"FLIP": False, "HAS_BIAS": bias is not None, "SILU": silu}
    _launch("short_conv_kernel", tensors, x, weight.shape[1], left, _compute_dtype(x, weight), **flags)
    return y


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, left: int, silu: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("chela::short_conv_triton_backward", mutates_args=())
def _backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, left: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    batch, length, channels = x.shape
    taps, dtype = weight.shape[1], _compute_dtype(x, weight)
    d_x, d_sum = torch.empty_like(x), torch.empty_like(x, dtype=dtype) if silu else grad
    partial = x.new_empty(batch * -(-length // BLOCK_L), taps + 1, channels, dtype=dtype)
    tensors = [grad, x, weight, weight if bias is None else bias.contiguous(), d_sum, partial]
    _launch("short_conv_backward_kernel", tensors, x, taps, left, dtype, HAS_BIAS=bias is not None, SILU=silu)
    mirrored = {"FLIP": True, "HAS_BIAS": False, "SILU": False}
    _launch("short_conv_kernel", [d_sum, weight, weight, d_x], x, taps, taps - 1 - left, dtype, **mirrored)
    parts = partial.sum(0)
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return d_x, parts[:taps].T.to(weight.dtype).contiguous(), parts[taps].to(bias_dtype, copy=True)


@_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, left: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    return d_x, d_weight, weight.new_empty(weight.shape[0], dtype=weight.dtype if bias is None else bias.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.left, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    gradients = _backward_op(grad, x, weight, bias, ctx.left, ctx.silu)
    wanted = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None)


_forward_op.register_autograd(_backward, setup_context=_save)
