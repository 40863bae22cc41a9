"""Short depthwise convolution with an optional SiLU: the public function and its checks."""

from __future__ import annotations

from torch import Tensor

from chela.ops.backend import Backend, Problem, check_tensors, choose, register, why_no_triton
from chela.ops.sequence_parallel import current
from chela.ops.short_conv.cpu import short_conv_torch
from chela.ops.short_conv.plain import short_conv_plain
from chela.ops.short_conv.reference import short_conv_reference
from chela.ops.short_conv.step import short_conv_step
from chela.ops.short_conv.triton import short_conv_triton

__all__ = ["short_conv", "short_conv_step"]

register(
    "short_conv",
    Backend("triton", short_conv_triton, auto_on=("cuda",), why_not=why_no_triton),
    Backend("torch", short_conv_torch, auto_on=("*",)),
    Backend("plain", short_conv_plain),
    Backend("reference", short_conv_reference),
)

MIN_TAPS, MAX_TAPS = 2, 31


def short_conv(x: Tensor, weight: Tensor, *, causal: bool = False, silu: bool = False, backend: str = "auto") -> Tensor:
    """Convolve every channel with its own few taps.

    ``y_t = Σ_{j=0}^{K−1} weight[j]·x_{t+j−left}``, x being 0 outside, with left = K − 1 (causal) or (K − 1)//2
    (same); then SiLU when asked for. As in ``torch.nn.Conv1d``, the taps run forward in time. O(B·L·C·K). Inside
    ``sequence_parallel`` the K − 1 tokens around a piece come from its neighbours.

    Args:
        x: ``(B, L, C)``, any floating dtype; at least float32 is computed in, also under autocast.
        weight: ``(C, K)``, 2 ≤ K ≤ 31.
        causal: Whether y_t sees x up to t only.
        silu: Whether SiLU is applied to the result.
        backend: "auto", or one of those that ``chela.ops.backends()`` lists.

    Returns:
        ``(B, L, C)`` in the dtype of x.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, or a backend that cannot run here.

    >>> import torch
    >>> x = torch.tensor([[[0.0], [1.0], [0.0], [0.0]]])
    >>> short_conv(x, torch.tensor([[1.0, 2.0, 3.0]]), causal=True).flatten().tolist()
    [0.0, 3.0, 2.0, 1.0]
    """
    check_tensors("short_conv", {"x": (x, "B L C"), "weight": (weight, "C K")})
    taps = weight.shape[1]
    if not MIN_TAPS <= taps <= MAX_TAPS:
        raise ValueError(f"short_conv: expected {MIN_TAPS} <= K <= {MAX_TAPS} taps, got {taps}; fft_conv takes more")
    run = choose("short_conv", backend, Problem(x.device, x.dtype, (x.shape[2],))).run
    if 0 in x.shape:
        run = short_conv_reference  # no tokens or channels: nothing to launch
    left = taps - 1 if causal else (taps - 1) // 2
    piece = current()
    if piece is None:
        y: Tensor = run(x, weight, left, silu)
        return y
    around = piece.with_neighbours(x, left, taps - 1 - left)
    before = min(left, piece.start) if x.shape[1] else 0
    return run(around, weight, left, silu).narrow(1, before, x.shape[1])  # type: ignore[no-any-return]
