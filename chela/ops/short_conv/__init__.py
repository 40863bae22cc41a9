"""Short depthwise convolution with an optional SiLU: the public function and its checks."""

from __future__ import annotations

from torch import Tensor

from chela.ops import backend as _backend
from chela.ops.short_conv.reference import short_conv_reference
from chela.ops.short_conv.torch_conv import short_conv_torch
from chela.ops.short_conv.triton_conv import short_conv_triton, why_not

__all__ = ["short_conv"]

MIN_TAPS, MAX_TAPS = 2, 31


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    silu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Convolve every channel with its own few taps.

    `y_t = bias + Σ_{j=0}^{K−1} weight[j]·x_{t+j−left}`, x being 0 outside, with left = K − 1 (causal) or (K − 1)//2
    (same); then SiLU when asked for. As in `torch.nn.Conv1d`, the taps run forward in time. O(B·L·C·K).

    Args:
        x: `(B, L, C)`, any floating dtype; at least float32 is computed in, also under autocast.
        weight: `(C, K)`, 2 ≤ K ≤ 31.
        bias: `(C,)` or None.
        causal: Whether y_t sees x up to t only.
        silu: Whether SiLU is applied to the result.
        backend: "auto", or one of those that `chela.ops.backends()` lists.

    Returns:
        `(B, L, C)` in the dtype of x.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, or a backend that cannot run here.

    >>> import torch
    >>> x = torch.tensor([[[0.0], [1.0], [0.0], [0.0]]])
    >>> short_conv(x, torch.tensor([[1.0, 2.0, 3.0]]), causal=True).flatten().tolist()
    [0.0, 3.0, 2.0, 1.0]
    """
    _check(x, weight, bias)
    y: Tensor = _backend.choose("short_conv", backend, x.device).run(x, weight, bias, causal, silu)
    return y


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 3:
        raise ValueError(f"short_conv: expected x of shape (B, L, C), got {tuple(x.shape)}")
    channels = x.shape[2]
    if weight.dim() != 2 or weight.shape[0] != channels or not MIN_TAPS <= weight.shape[1] <= MAX_TAPS:
        raise ValueError(
            f"short_conv: expected weight (C={channels}, K) with {MIN_TAPS} <= K <= {MAX_TAPS}, got "
            f"{tuple(weight.shape)}; longer kernels are for fft_conv"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"short_conv: expected bias (C={channels},), got {tuple(bias.shape)}")
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if not t.is_floating_point():
            raise ValueError(f"short_conv: expected a real floating dtype for {name}, got {t.dtype}; cast it first")
        if t.device != x.device:
            raise ValueError(f"short_conv: {name} is on {t.device}, x on {x.device}; move them to one device")


_backend.register("short_conv", _backend.Backend("triton", short_conv_triton, auto_on=("cuda",), why_not=why_not))
_backend.register("short_conv", _backend.Backend("torch", short_conv_torch, auto_on=("*",)))
_backend.register("short_conv", _backend.Backend("reference", short_conv_reference))
