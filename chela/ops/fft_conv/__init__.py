"""Long depthwise convolution by FFT: the public function, its checks and its registration with PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chela.ops import backend as _backend
from chela.ops.fft_conv import fft
from chela.ops.fft_conv.reference import fft_conv_reference

__all__ = ["fft_conv"]


def fft_conv(
    u: Tensor,
    kernel: Tensor,
    *,
    kernel_back: Tensor | None = None,
    skip: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Convolve every channel with its own long kernel, causally or in both directions.

    `y_t = skip·u_t + Σ_{s=0}^{K−1} kernel[s]·u_{t−s} + Σ_{s=0}^{K_back−1} kernel_back[s]·u_{t+1+s}`, u being 0 outside.
    Lag 0 lives in `kernel` alone, and lags beyond the sequence are ignored. O(B·C·L log L) time; the memory
    beside inputs and outputs is that of one block of channels. The backward keeps u and the kernels, nothing else.

    Args:
        u: `(B, L, C)`, any floating dtype; at least float32 is computed in, also under autocast.
        kernel: `(C, K)`, K ≥ 1, shorter or longer than L.
        kernel_back: `(C, K_back)` looks ahead; None for a causal convolution.
        skip: `(C,)`, added to lag 0.
        backend: "auto", or one of those that `chela.ops.backends()` lists.

    Returns:
        `(B, L, C)` in the dtype of u.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, or a backend that cannot run here.

    >>> u = torch.zeros(1, 4, 1)
    >>> u[0, 1] = 1
    >>> y = fft_conv(u, torch.tensor([[1.0, 2.0]]), kernel_back=torch.tensor([[3.0]]), skip=torch.tensor([0.5]))
    >>> [round(v, 4) for v in y.flatten().tolist()]
    [3.0, 1.5, 2.0, 0.0]

    Source: the kernel as long as the sequence is SGConv's (arXiv 2210.09298) and MEGA's (arXiv 2209.10655, section 3).
    """
    _check(u, kernel, kernel_back, skip)
    if kernel_back is None:
        kernel_back = kernel.new_empty(kernel.shape[0], 0)
    y: Tensor = _backend.choose("fft_conv", backend, u.device).run(u, kernel, kernel_back, skip)
    return y


def _check(u: Tensor, kernel: Tensor, kernel_back: Tensor | None, skip: Tensor | None) -> None:
    if u.dim() != 3:
        raise ValueError(f"fft_conv: expected u of shape (B, L, C), got {tuple(u.shape)}")
    channels = u.shape[2]
    if kernel.dim() != 2 or kernel.shape[0] != channels or kernel.shape[1] < 1:
        raise ValueError(f"fft_conv: expected kernel (C={channels}, K>=1) for this u, got {tuple(kernel.shape)}")
    if kernel_back is not None and (kernel_back.dim() != 2 or kernel_back.shape[0] != channels):
        raise ValueError(f"fft_conv: expected kernel_back (C={channels}, K_back), got {tuple(kernel_back.shape)}")
    if skip is not None and skip.shape != (channels,):
        raise ValueError(f"fft_conv: expected skip (C={channels},), got {tuple(skip.shape)}")
    for name, x in (("u", u), ("kernel", kernel), ("kernel_back", kernel_back), ("skip", skip)):
        if x is None:
            continue
        if not x.is_floating_point():
            raise ValueError(f"fft_conv: expected a real floating dtype for {name}, got {x.dtype}; cast it first")
        if x.device != u.device:
            raise ValueError(f"fft_conv: {name} is on {x.device}, u on {u.device}; move them to one device")


@torch.library.custom_op("chela::fft_conv", mutates_args=())
def _fft_conv(u: Tensor, kernel: Tensor, kernel_back: Tensor, skip: Tensor | None) -> Tensor:
    return fft.convolve(u, kernel, kernel_back, skip)


@_fft_conv.register_fake
def _(u: Tensor, kernel: Tensor, kernel_back: Tensor, skip: Tensor | None) -> Tensor:
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


@torch.library.custom_op("chela::fft_conv_backward", mutates_args=())
def _fft_conv_backward(
    grad: Tensor,
    u: Tensor,
    kernel: Tensor,
    kernel_back: Tensor,
    skip: Tensor | None,
    input_grad: bool,
    kernel_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return fft.convolve_backward(grad, u, kernel, kernel_back, skip, input_grad, kernel_grad)


@_fft_conv_backward.register_fake
def _(
    grad: Tensor,
    u: Tensor,
    kernel: Tensor,
    kernel_back: Tensor,
    skip: Tensor | None,
    input_grad: bool,
    kernel_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return fft.empty_gradients(u, kernel, kernel_back, input_grad, kernel_grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    u, kernel, kernel_back, skip = ctx.saved_tensors
    for_u, for_kernel, for_back, for_skip = ctx.needs_input_grad
    of_kernel = for_kernel or for_back or for_skip
    d_u, d_kernel, d_back = _fft_conv_backward(grad, u, kernel, kernel_back, skip, for_u, of_kernel)
    d_skip = d_kernel[:, 0].to(skip.dtype) if for_skip else None
    return d_u if for_u else None, d_kernel if for_kernel else None, d_back if for_back else None, d_skip


_fft_conv.register_autograd(_backward, setup_context=_save)

_backend.register("fft_conv", _backend.Backend("fft", _fft_conv, auto_on=("*",)))
_backend.register("fft_conv", _backend.Backend("reference", fft_conv_reference))
