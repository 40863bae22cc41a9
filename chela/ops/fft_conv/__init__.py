"""Long depthwise convolution by FFT: the public function and its checks. README.md has the maths and the costs."""

from __future__ import annotations

from torch import Tensor

from chela.ops.backend import Backend, Problem, check_tensors, choose, register
from chela.ops.fft_conv.cpu import convolve, fft_conv_fast
from chela.ops.fft_conv.plain import fft_conv_plain
from chela.ops.fft_conv.reference import fft_conv_reference
from chela.ops.fft_conv.step import FFTConvState, StepKernel, fft_conv_prefill, fft_conv_step
from chela.ops.sequence_parallel import current

__all__ = ["FFTConvState", "StepKernel", "convolve_in_order", "fft_conv", "fft_conv_prefill", "fft_conv_step"]

register(
    "fft_conv",
    Backend("fft", fft_conv_fast, auto_on=("*",)),
    Backend("plain", fft_conv_plain),
    Backend("reference", fft_conv_reference),
)


def fft_conv(
    u: Tensor, kernel: Tensor, *, kernel_back: Tensor | None = None, skip: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    r"""Convolve every channel with its own long kernel, causally or in both directions.

    ``y_t = skip·u_t + Σ_{s=0}^{K−1} kernel[s]·u_{t−s} + Σ_{s=0}^{K_back−1} kernel_back[s]·u_{t+1+s}``, u being 0
    outside. Lag 0 is in ``kernel`` alone, and lags beyond the sequence are ignored. O(B·C·L log L) time; the memory
    beside inputs and outputs is that of one block of channels. The backward keeps u and the kernels, nothing else.

    Inside ``sequence_parallel`` u is a piece and the kernels those of the channels that ``extent`` names. An all-to-all
    makes whole sequences of these channels, another one pieces of all: of length/P tokens of C channels each process
    sends 2·B·(length/P)·C·(P − 1)/P numbers forward and as many backward, so O(B·length·C/P).

    Args:
        u: ``(B, L, C)``, any floating dtype; at least float32 is computed in, also under autocast.
        kernel: ``(C, K)``, K ≥ 1, shorter or longer than L.
        kernel_back: ``(C, K_back)`` looks ahead; None for a causal convolution.
        skip: ``(C,)``, added to lag 0.
        backend: "auto", or one of those that ``chela.ops.backends()`` lists.

    Returns:
        ``(B, L, C)`` in the dtype of u.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, or a backend that cannot run here.

    >>> import torch
    >>> u = torch.zeros(1, 4, 1)
    >>> u[0, 1] = 1
    >>> y = fft_conv(u, torch.tensor([[1.0, 2.0]]), kernel_back=torch.tensor([[3.0]]), skip=torch.tensor([0.5]))
    >>> [round(v, 4) + 0.0 for v in y.flatten().tolist()]
    [3.0, 1.5, 2.0, 0.0]

    Source: the kernel as long as the sequence is SGConv's (arXiv 2210.09298) and MEGA's (arXiv 2209.10655, section 3).
    """
    piece, whole = current(), u
    if piece is not None:
        u = piece.to_channels(u)
    channels = {"u": (u, "B L C"), "kernel": (kernel, "C K"), "kernel_back": (kernel_back, "C K_back")}
    check_tensors("fft_conv", {**channels, "skip": (skip, "C")})
    if not kernel.shape[1]:
        raise ValueError(f"fft_conv: expected kernel (C, K>=1), got {tuple(kernel.shape)}")
    if kernel_back is None:
        kernel_back = kernel.new_empty(kernel.shape[0], 0)
    y: Tensor = choose("fft_conv", backend, Problem(u.device, u.dtype, (u.shape[2],))).run(u, kernel, kernel_back, skip)
    return y if piece is None else piece.to_tokens(y, whole.shape[2])


def convolve_in_order(u: Tensor, lags: Tensor) -> Tensor:
    """Convolve ``u: (B, L, C)`` with all lags in order, from −(L − 1) to L − 1 ``(C, 2·L − 1)``, or from 0 ``(C, L)``.

    It is ``fft_conv`` by its fast backend, without laying out its kernel. Inside ``sequence_parallel`` L is the whole
    sequence's, and C what ``extent`` names.
    """
    piece = current()
    if piece is None:
        return convolve(u, lags)  # type: ignore[no-any-return]
    return piece.to_tokens(convolve(piece.to_channels(u), lags), u.shape[2])
